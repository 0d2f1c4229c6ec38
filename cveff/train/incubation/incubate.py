"""`Incubate`: train a network's modules apart, each within a shallow copy of the network, then assemble and tune."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from cveff.errors import StepError
from cveff.files import write_json
from cveff.model import Model, save
from cveff.steps import Run
from cveff.train.flops import training_flops
from cveff.train.incubation.executor import Executor, do_all
from cveff.train.incubation.parts import divide
from cveff.train.incubation.task import Outcome, Phase, do, images_of
from cveff.train.loop import fit
from cveff.train.train import Train

META, INCUBATE, TUNE = 1.0, 1 / 3, 1 / 3
"""Epochs of the phases as shares of end-to-end training's: the authors' 300, 100 and 100 on ImageNet."""


@dataclass(frozen=True)
class Incubate:
    """Train the network as modules that never see each other, then put them together and tune them.

    Deep Incubation (Ni et al., arXiv:2212.04129, section 3): a meta model, with one block for each of the modules, is
    trained end to end; module i then takes meta layer i's place and is trained on the task's own loss, all else of the
    meta model frozen; the modules are assembled and fine-tuned. Of a module's blocks the weights start as they were
    given; what stands between blocks, the stem and the head start from the meta model's.

    Blocks are found in ViT, ConvNeXt, ResNet and whatever else repeats residual blocks.

    Attributes:
        modules: how many, K; blocks are shared out evenly. 1 is ordinary training by `incubate`, then by `tune`.
        meta: how the meta model is trained.
        incubate: how each module is trained.
        tune: how the assembled network is trained on; 0 epochs: not at all.
        executor: where modules are trained: "turn", one after the other; "processes" of this machine; or "ray", as
            tasks on a Ray cluster whose machines share the run's folder.
        workers: "processes" at a time; 0: one a module.

    Raises:
        StepError: at construction, for a value out of range.
    """

    modules: int = 4
    meta: Train = field(default_factory=lambda: Train(epochs=30))
    incubate: Train = field(default_factory=lambda: Train(epochs=10))
    tune: Train = field(default_factory=lambda: Train(epochs=10, warmup_epochs=0.0, clip_norm=1.0))
    executor: Executor = "turn"
    workers: int = 0

    kind: ClassVar[str] = "incubate"
    requires: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        if self.modules < 1:
            raise StepError(f"incubate.modules is {self.modules!r}; give 1 or more")
        if self.executor not in ("turn", "processes", "ray"):
            raise StepError(f"incubate.executor is {self.executor!r}; give turn, processes or ray")
        if self.workers < 0:
            raise StepError(f"incubate.workers is {self.workers!r}; give 0 or more")
        for name, train in (("meta", self.meta), ("incubate", self.incubate)):
            if train.epochs == 0:
                raise StepError(f"incubate.{name}.epochs is 0; train for some")
        for name, train in (("meta", self.meta), ("incubate", self.incubate), ("tune", self.tune)):
            if train.grow:
                raise StepError(f"incubate.{name}.grow changes what is assembled; leave it out")

    @classmethod
    def of(cls, train: Train, modules: int) -> Incubate:
        """The phases that stand for end-to-end training by `train`, at the authors' shares of its epochs."""

        def part(share: float) -> Train:
            epochs = max(1, round(share * train.epochs))
            return replace(train, epochs=epochs, warmup_epochs=min(train.warmup_epochs * share, epochs))

        tune = replace(part(TUNE), warmup_epochs=0.0, clip_norm=train.clip_norm or 1.0)
        return cls(modules, part(META), part(INCUBATE), tune)

    def __call__(self, model: Model, run: Run) -> Model:
        """Train and return the assembled, tuned network. `run.folder` gets `incubation.json`: the seconds and floating-
        point operations of each phase, their sum, and the seconds of the critical path, on which all modules are
        trained at once.

        Raises:
            StepError: fewer blocks than modules, or no training images.
            CheckpointError: what there is to resume has other settings.
            TrainingError: as `Train`.
        """
        if run.folder is not None:
            return self._in(run.folder, model, run)
        with TemporaryDirectory() as folder:
            return self._in(Path(folder), model, run)

    def _in(self, folder: Path, model: Model, run: Run) -> Model:
        if run.data is None or run.data.train is None:
            raise StepError("Incubate needs images with labels; pass data=… with a training split")
        model.module.cpu()
        parts = divide(model.module, model.spec.input, self.modules)
        save(model, folder / "start")

        def phase(name: str, index: int | None, train: Train) -> Phase:
            assert run.data is not None
            return Phase(name, folder, parts, index, train, run.data, run.seed, run.device, run.resume)

        outcomes: dict[str, Outcome] = {}
        if self.modules > 1:
            run.progress.message(f"training the meta model of {self.modules} layers")
            outcomes["meta"] = do(phase("meta", None, self.meta), run.progress)
        modules = [phase(f"module-{index}", index, self.incubate) for index in range(len(parts))]
        run.progress.message(f"incubating {len(parts)} modules ({self.executor})")
        outcomes |= zip(
            (item.name for item in modules),
            do_all(modules, self.executor, self.workers, run.progress),
            strict=True,
        )
        for item in modules:
            model.module.load_state_dict(outcomes[item.name].tensors, strict=False)
        figures = {name: dict(outcome.figures) for name, outcome in outcomes.items()}
        model, figures["tune"] = self._tune(model, replace(run, folder=folder / "tune"))
        self._report(figures, folder, run)
        return model

    def _tune(self, model: Model, run: Run) -> tuple[Model, dict[str, float]]:
        assert run.data is not None and run.folder is not None
        flops = training_flops(model.module, model.spec.input) * images_of(self.tune, run.data)
        resumed = run.resume and (run.folder / "state.safetensors").is_file()
        run.progress.message("tuning the assembled network")
        started = time.monotonic()
        model = fit(model, self.tune, run)
        return model, {"seconds": time.monotonic() - started, "flops": flops, "resumed": float(resumed)}

    def _report(self, phases: Mapping[str, Mapping[str, float]], folder: Path, run: Run) -> None:
        apart = [values["seconds"] for name, values in phases.items() if name.startswith("module-")]
        along = [values["seconds"] for name, values in phases.items() if not name.startswith("module-")]
        totals = {
            "seconds": sum(apart) + sum(along),
            "critical_path_seconds": max(apart) + sum(along),
            "flops": sum(values["flops"] for values in phases.values()),
        }
        write_json(folder / "incubation.json", {"phases": phases, **totals})
        assert run.data is not None and run.data.train is not None
        steps = self.tune.epochs * run.data.train.num_training_batches(self.tune.batch_size)
        run.log.write(steps, {f"incubation/{name}": value for name, value in totals.items()})
        run.progress.message(
            f"{totals['flops']:.3g} floating-point operations in {len(phases)} phases; "
            f"{totals['seconds']:.0f} s in all, {totals['critical_path_seconds']:.0f} s with all modules at once"
        )
