"""`Elastic`: one training for a whole family of networks that share their weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from cveff.compress.analysis import analyze
from cveff.compress.importance import DATA_CRITERIA, Criterion, score
from cveff.compress.samples import samples
from cveff.dynamic.elastic_space import ElasticSpace
from cveff.dynamic.find_space import find_space
from cveff.dynamic.sandwich import Sandwich
from cveff.dynamic.supernet import Supernet
from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.steps import Run
from cveff.train import Train
from cveff.train.loop import fit

_IMAGES = 256
"""Images that importance looks at, where it looks at any."""


def _default_training() -> Train:
    # The best epoch of the largest network says little about the others.
    return Train(keep="last")


@dataclass(frozen=True)
class Elastic:
    """Train a network so that many smaller ones inside it work as well as if each had been trained alone.

    Every step trains the largest network on the labels, and the smallest and `num_random` others to answer as it does
    (sandwich rule and in-place distillation: Yu & Huang, ICCV 2019). Sub-nets keep the leading channels of each group,
    the leading blocks of each stage and the centres of depthwise kernels (Cai et al., "Once-for-All", ICLR 2020).
    `ExtractSubNet` makes one of them a plain model.

    Attributes:
        widths: shares of its units that a group of channels may keep; 1 is always among them.
        depth: how many of its last residual blocks a stage may lose; what it begins with stays. 0: none.
        kernels: sides that depthwise kernels may have, up to what they have; none: they stay as they are.
        resolutions: heights of images in pixels beside the model's own, which is the largest; the width follows.
        vary: "layers": every group, stage and kernel has its own level, as once-for-all networks; "network": one share,
            one depth and one side for all, as slimmable networks.
        kernel_transform: learn a matrix for each smaller kernel, rather than share the centre as it is.
        num_random: random sub-nets a step. What a step costs is the sum of its networks' operations.
        importance: which channels lead, of a network that is trained already; as for `Prune`.
        round_to: channels are left in multiples of this; by default of the target's `channel_multiple`, or of 8.
        train: how to train; by default as `Train`, and the last weights are kept.

    Raises:
        StepError: at construction, for a value out of range.
    """

    widths: tuple[float, ...] = (1.0, 0.75, 0.5)
    depth: int = 2
    kernels: tuple[int, ...] = (7, 5, 3)
    resolutions: tuple[int, ...] = ()
    vary: Literal["layers", "network"] = "layers"
    kernel_transform: bool = False
    num_random: int = 2
    importance: Criterion = "magnitude"
    round_to: int | None = None
    train: Train = field(default_factory=_default_training)

    kind: ClassVar[str] = "elastic"
    requires: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        self._check("widths", all(0 < share <= 1 for share in self.widths), "shares above 0, up to 1")
        self._check("depth", self.depth >= 0, "0 or more blocks")
        self._check("kernels", all(side >= 1 for side in self.kernels), "sides of 1 or more")
        self._check("resolutions", all(side >= 1 for side in self.resolutions), "positive heights in pixels")
        self._check("vary", self.vary in ("layers", "network"), "'layers' or 'network'")
        self._check("num_random", self.num_random >= 0, "0 or more")
        self._check("importance", self.importance in get_args(Criterion), ", ".join(get_args(Criterion)))
        self._check("round_to", self.round_to is None or self.round_to >= 1, "1 or more channels")

    def __call__(self, model: Model, run: Run) -> Model:
        """Find what is elastic, train all of it, and return the largest network, which knows its sub-nets.

        Raises:
            StepError: nothing of the network is elastic (the message says why), a resolution is too large or cannot be
                had, or the model is elastic already.
            TrainingError, CheckpointError: as `Train`.
        """
        supernet = self.prepare(model, run)
        run.progress.message(f"elastic: {supernet.elastic_parts}")
        elastic = with_module(model, supernet.space.apply(model.module), supernet.space)
        return fit(elastic, self.train, run, Sandwich(supernet, self.num_random, self.train.label_smoothing))

    def prepare(self, model: Model, run: Run) -> Supernet:
        """The sub-nets, before any training; `model` is left as it is.

        Raises:
            StepError: as a call.
        """
        if any(isinstance(edit, ElasticSpace) for edit in model.spec.edits):
            raise StepError(f"{model.spec.architecture} is elastic already; extract a sub-net of it instead")
        height, width = model.spec.input.size
        for side in self.resolutions:
            if side > height:
                raise StepError(
                    f"elastic.resolutions: {side} is larger than the model's images, {height}×{width}; create the "
                    "model for the largest size"
                )
        model.module.cpu()
        analysis = analyze(model.module, model.spec.input)
        batches = None
        if self.importance in DATA_CRITERIA:
            assert run.data is not None
            split = run.data.train if run.data.train is not None else run.data.val
            batches = samples(split, model.spec.input, _IMAGES, seed=run.seed)
        space = find_space(
            model,
            analysis,
            score(model.module, analysis.groups, self.importance, batches=batches, seed=run.seed),
            shares=sorted({1.0, *self.widths}, reverse=True),
            depth=self.depth,
            sides=sorted(set(self.kernels), reverse=True),
            sizes=[
                (side, max(1, round(side * width / height)))
                for side in sorted(set(self.resolutions), reverse=True)
            ],
            round_to=self.round_to or run.channel_multiple,
            apart=self.vary == "layers",
            transform=self.kernel_transform,
        )
        return Supernet(model.spec, space, analysis, run.device)

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise StepError(f"elastic.{name} is {getattr(self, name)!r}; give {wanted}")
