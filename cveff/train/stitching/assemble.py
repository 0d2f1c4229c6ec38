"""`Assemble`: stages of several trained networks, chosen by likeness, joined by adapters, and tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from cveff.compress.samples import forget
from cveff.data.dataset import Split
from cveff.data.sampling import calibration_images
from cveff.errors import StepError
from cveff.files import write_json
from cveff.model import Model, ModelSpec
from cveff.steps import Run
from cveff.subject import open_model
from cveff.train.loop import fit
from cveff.train.objective import Constraint, CrossEntropy
from cveff.train.stitching.assembly import Assembled
from cveff.train.stitching.choose import Choice, assess, choose
from cveff.train.stitching.join import fit_adapters, plan
from cveff.train.stitching.survey import Staged, similarity, staged
from cveff.train.train import Train

Start = Literal["least-squares", "random"]
BATCH = 64
"""Images that are looked at together; no effect on results."""


@dataclass(frozen=True)
class Assemble:
    """Join stages of this model and of others, trained on the same classes, and tune what they make.

    Each network is cut into stages. Of all assemblies of two networks or more, that one is taken whose features are
    most alike where the networks meet (the idea of Deep Model Reassembly: Yang et al., arXiv:2210.17409): the product
    over its joints of linear CKA (Kornblith et al., arXiv:1905.00414). Between two networks stands an adapter: a
    resize, a 1 × 1 convolution and a batch norm, which start as the least-squares solution between the features that
    come in and those that the next stage knows (Stitchable Neural Networks: Pan et al., arXiv:2302.06586). First the
    adapters are trained alone, then all.

    Attributes:
        models: the other networks, each a saved model's or a run's folder, or a zoo card's name.
        stages: how many each network is cut into, at even shares of its operations.
        cuts: one list a network, this one first: paths of the modules that its stages but the last end with, in place
            of even shares.
        use: which network gives each stage, this one being 0, in place of the choice by likeness.
        max_parameters: of the assembled network.
        max_macs: multiply-accumulate operations of one image.
        images: from the training split, that similarity and adapters are computed from.
        start: how adapters begin: "least-squares", or "random" to compare with.
        adapters: how the adapters are trained alone; 0 epochs: not at all.
        tune: how the whole network is trained; 0 epochs: not at all.

    Raises:
        StepError: at construction, for a value out of range or settings that contradict each other.
    """

    models: tuple[str, ...] = ()
    stages: int = 4
    cuts: tuple[tuple[str, ...], ...] = ()
    use: tuple[int, ...] = ()
    max_parameters: int | None = None
    max_macs: int | None = None
    images: int = 512
    start: Start = "least-squares"
    adapters: Train = field(
        default_factory=lambda: Train(epochs=2, optimizer="adamw", learning_rate=1e-3, warmup_epochs=0.0)
    )
    tune: Train = field(
        default_factory=lambda: Train(
            epochs=10, optimizer="adamw", learning_rate=5e-4, weight_decay=0.05, clip_norm=1.0
        )
    )

    kind: ClassVar[str] = "assemble"
    requires: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        if not self.models:
            raise StepError("assemble.models is empty, and one model alone cannot be assembled; name others")
        if self.start not in get_args(Start):
            raise StepError(f"assemble.start is {self.start!r}; give {' or '.join(get_args(Start))}")
        count = len(self.models) + 1
        if self.cuts and len(self.cuts) != count:
            raise StepError(f"assemble.cuts has {len(self.cuts)} lists for {count} networks; give one each")
        if len({len(paths) for paths in self.cuts}) > 1 or () in self.cuts:
            raise StepError("assemble.cuts must name as many modules of each network, and at least one")
        if self.num_stages < 2:
            raise StepError(f"assemble.stages is {self.stages!r}; give 2 or more")
        if self.use:
            self._check_use(count)
        for name, limit in (("max_parameters", self.max_parameters), ("max_macs", self.max_macs)):
            if limit is not None and limit < 1:
                raise StepError(f"assemble.{name} is {limit!r}; give a positive number")
        if self.images < 2:
            raise StepError(f"assemble.images is {self.images!r}; give 2 or more")
        for name, train in (("adapters", self.adapters), ("tune", self.tune)):
            if train.grow:
                raise StepError(f"assemble.{name}.grow changes what is assembled; leave it out")

    def _check_use(self, count: int) -> None:
        if len(self.use) != self.num_stages:
            raise StepError(
                f"assemble.use names a network for {len(self.use)} stages, and there are {self.num_stages}; give one "
                "each"
            )
        if not set(self.use) <= set(range(count)):
            raise StepError(f"assemble.use is {list(self.use)}; networks are numbered 0 to {count - 1}")
        if len(set(self.use)) == 1:
            raise StepError(f"assemble.use takes every stage from network {self.use[0]}; name two or more")
        if self.max_parameters is not None or self.max_macs is not None:
            raise StepError("assemble.use chooses already; leave max_parameters and max_macs out")

    @property
    def num_stages(self) -> int:
        """Stages of each network."""
        return len(self.cuts[0]) + 1 if self.cuts else self.stages

    def __call__(self, model: Model, run: Run) -> Model:
        """Choose, join, fit, tune. `run.folder` gets `assembly.json`: the choice, the similarities, and the share of
        variance that each adapter's first weights leave unexplained.

        Raises:
            StepError: models that do not fit together, a network without such stages, or limits that no assembly meets.
            UnknownModelError, CheckpointError: as `load`, and what there is to resume has other settings.
            TrainingError: as `Train`.
        """
        return self.join([model, *map(open_model, self.models)], run)

    def check_run(self, run: Run) -> None:
        """Refuse models that do not exist, or of other classes, before anything starts.

        Raises:
            StepError, UnknownModelError, CheckpointError: naming the model.
        """
        for name in self.models:
            labels = open_model(name).spec.labels
            if run.data is not None and len(labels) != run.data.num_classes:
                raise StepError(
                    f"assemble.models: {name} has {len(labels)} classes and the data {run.data.num_classes}; all "
                    "models must know the data's classes"
                )

    def join(self, models: Sequence[Model], run: Run) -> Model:
        """As a call, for models in memory, which are used up; of `self.models` only the number matters.

        Raises:
            StepError, TrainingError: as a call.
        """
        if run.data is None or run.data.train is None:
            raise StepError("Assemble needs images with labels; pass data=… with a training split")
        _check(models)
        if len(models) != len(self.models) + 1:
            raise StepError(
                f"{len(models)} models were given, and assemble.models names {len(self.models)} besides one"
            )
        networks = []
        for index, model in enumerate(models):
            forget(model.module.to(run.device))
            networks.append(staged(model, self.stages, self.cuts[index] if self.cuts else ()))
        run.progress.message(f"comparing {len(models)} networks of {self.num_stages} stages")
        alike = similarity(networks, self._batches(run.data.train, models[0], run.seed), run.device)
        parents = [network.parent for network in networks]
        if self.use:
            choice = assess(self.use, parents, alike)
        else:
            choice = choose(parents, alike, self.max_parameters, self.max_macs)
        model, errors = self._joined(networks, choice, run)
        self._report(networks, choice, alike, errors, run)
        return self._tuned(model, run)

    def _batches(self, split: Split, model: Model, seed: int) -> list[np.ndarray]:
        images = calibration_images(split, model.spec.input, self.images, seed)
        return [images[first : first + BATCH] for first in range(0, len(images), BATCH)]

    def _joined(self, networks: Sequence[Staged], choice: Choice, run: Run) -> tuple[Model, list[float]]:
        assert run.data is not None and run.data.train is not None
        order, edit = plan(networks, choice)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            module = edit.join([network.model.module for network in order]).to(run.device).eval()
        errors: list[float] = []
        first = order[0].model
        if self.start == "least-squares":
            batches = self._batches(run.data.train, first, run.seed)
            errors = fit_adapters(module, edit, order, batches, run.device)
        spec = replace(first.spec, labels=networks[0].model.spec.labels, edits=(*first.spec.edits, edit))
        # Trained networks are channels last in memory, saved ones are not, and their sums differ in the last bit.
        return Model(spec, module.cpu().to(memory_format=torch.contiguous_format)), errors  # type: ignore[call-overload]

    def _report(
        self,
        networks: Sequence[Staged],
        choice: Choice,
        alike: list[list[list[float]]],
        errors: list[float],
        run: Run,
    ) -> None:
        names = [network.model.spec.architecture for network in networks]
        run.progress.message(
            f"stages of {', '.join(names[index] for index in choice.use)}: similarity {choice.similarity:.3f}, "
            f"{choice.parameters:,} parameters, {choice.macs:,} operations"
        )
        run.log.write(0, {"assembly/similarity": choice.similarity})
        if run.folder is not None:
            values = {
                "networks": names,
                "cuts": [list(network.parent.cuts) for network in networks],
                "choice": asdict(choice),
                "similarity": alike,
                "unexplained": errors,
            }
            write_json(run.folder / "assembly.json", values)

    def _tuned(self, model: Model, run: Run) -> Model:
        module = model.module
        assert isinstance(module, Assembled)
        if self.adapters.epochs:
            run.progress.message("training the adapters")
            module.sections.requires_grad_(False)
            objective = _AdaptersAlone(self.adapters.label_smoothing)
            model = fit(model, self.adapters, _within(run, "adapters"), objective)
            model.module.requires_grad_(True)
        if self.tune.epochs:
            run.progress.message("tuning the assembled network")
        return fit(model, self.tune, _within(run, "tune"))


class _AdaptersAlone(CrossEntropy):
    """Cross-entropy under which the sections keep their statistics and drop nothing."""

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of `module`'s logits, summed over the images."""
        module.get_submodule("sections").eval()
        return super().loss(module, images, targets)


def _within(run: Run, name: str) -> Run:
    return run if run.folder is None else replace(run, folder=run.folder / name)


def _check(models: Sequence[Model]) -> None:
    if len(models) < 2:
        raise StepError("one model alone cannot be assembled; give two or more")
    first = models[0].spec
    for other in (model.spec for model in models):
        if other.task != "classification":
            raise StepError(
                f"{other.architecture} is a {other.task} model; only classification models are assembled"
            )
        kept = [edit.kind for edit in other.edits if isinstance(edit, Constraint)]
        if kept:
            raise StepError(
                f"{other.architecture} was changed by {kept[0]}, which its stages would not keep; assemble first"
            )
        numbered = tuple(str(index) for index in range(len(first.labels)))
        # A model made without names numbers its classes: their order is all there is to go by.
        if first.labels != other.labels and not (
            len(first.labels) == len(other.labels) and numbered in (first.labels, other.labels)
        ):
            raise StepError(
                f"{first.architecture} and {other.architecture} were trained on other classes "
                f"({_some(first.labels)}; {_some(other.labels)}); assemble models of the same classes in the same order"
            )
        if _takes(first) != _takes(other):
            raise StepError(
                f"{first.architecture} takes images of {_shape(first)} and {other.architecture} of {_shape(other)}; "
                "assemble models of one input size and one number of channels"
            )


def _takes(spec: ModelSpec) -> tuple[object, ...]:
    return spec.input.size, spec.input.channels


def _some(labels: Sequence[str]) -> str:
    return f"{len(labels)}: {', '.join(labels[:3])}, …"


def _shape(spec: ModelSpec) -> str:
    return f"{spec.input.size[0]}×{spec.input.size[1]}×{spec.input.channels}"
