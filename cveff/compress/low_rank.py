"""`LowRank`: layers become chains of thinner ones where the device's clock says that they run faster.

Ranks are chosen by measured milliseconds against the part of each layer's output that they drop; the whole file is
then timed, and what did not make it faster is undone. See `low_rank_math` for the factors and their papers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cveff.backbones.reparameterize import has_branches
from cveff.compress.distill import Distill
from cveff.compress.low_rank_calibration import Batches, collect, sensitivities
from cveff.compress.low_rank_layers import find_layers
from cveff.compress.low_rank_options import Cost, LayerOptions, layer_options
from cveff.compress.low_rank_search import Search, report
from cveff.compress.odd_images import odd_images, told
from cveff.data.augment import normalize
from cveff.data.dataset import Split
from cveff.data.sampling import calibration_indices
from cveff.errors import StepError
from cveff.model import Model
from cveff.runtime.engines import ENGINES
from cveff.runtime.input_spec import InputSpec
from cveff.steps import Run

Method = Literal["svd", "spatial-vertical", "spatial-horizontal", "tucker"]

BATCH = 16
"""Images a forward pass of the calibration takes at once."""

SENSITIVITY_IMAGES = 64
"""Images whose gradients say how much a layer matters; the figure is a mean over their positions too."""


@dataclass(frozen=True)
class LowRank:
    """Replace linear layers and convolutions by factors of lower rank.

    Attributes:
        latency: goal for the exported file's time, as a share of what it is now, between 0 and 1; needs a target.
        energy: largest relative error of a layer's output, ‖Wx − W'x‖² / ‖Wx‖² around the mean, between 0 and 1; alone,
            every layer takes its fastest rank within it. At least one of latency and energy is needed.
        methods: what may be tried. "svd": the layer's own kernel to fewer channels and a 1×1 behind it;
            "spatial-vertical", "spatial-horizontal": a column and a row; "tucker": 1×1, a kernel between fewer
            channels, 1×1.
        whiten: fit the outputs on the run's images (no labels needed) rather than the weights.
        min_gain: share of its own time that a layer must save, or it is left alone.
        images: how many images the fit sees.
        exclude: paths of layers to leave alone, with all below them.
        engine: on which the layers are timed, "onnxruntime" or "openvino".
        recover: fine-tuning afterwards; by default none.

    Raises:
        StepError: at construction, for a value out of range or without a goal.
    """

    latency: float | None = None
    energy: float | None = None
    methods: tuple[Method, ...] = ("svd", "spatial-vertical", "spatial-horizontal", "tucker")
    whiten: bool = True
    min_gain: float = 0.05
    images: int = 256
    exclude: tuple[str, ...] = ()
    engine: str = "onnxruntime"
    recover: Distill | None = None

    kind: ClassVar[str] = "low_rank"
    requires: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.latency is None and self.energy is None:
            raise StepError(
                "low_rank has no goal; give latency=0.7 (of the file's time), or energy=0.05 (a layer's largest error)"
            )
        for name in ("latency", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise StepError(f"low_rank.{name} is {value!r}; give a share between 0 and 1")
        if not 0 <= self.min_gain < 1:
            raise StepError(f"low_rank.min_gain is {self.min_gain!r}; give a share of 0 or more, below 1")
        if self.images < 1:
            raise StepError(f"low_rank.images is {self.images!r}; give a positive number of images")
        unknown = [method for method in self.methods if method not in get_args(Method)]
        if unknown or not self.methods:
            raise StepError(
                f"low_rank.methods is {self.methods!r}; give some of {', '.join(get_args(Method))}"
            )
        if self.engine not in ENGINES:
            raise StepError(f"low_rank.engine is {self.engine!r}; known: {', '.join(ENGINES)}")
        # What this instance needs depends on its settings; `apply` then says so before any step starts.
        needs = [*(("data",) if self.whiten else ()), *(("timer",) if self.latency is not None else ())]
        object.__setattr__(self, "requires", tuple(needs))

    def __call__(self, model: Model, run: Run) -> Model:
        """Choose ranks, replace layers, time the file, and recover.

        With `energy` alone the model may come back as it was: where nothing gets faster, nothing is changed.

        Raises:
            StepError: no layer can be factorised, the goal cannot be reached (the message says what can), an
                excluded layer does not exist, or data or a target is missing.
        """
        if self.latency is not None and run.timer is None:
            raise StepError("low_rank.latency is a share of the file's time; pass target=… to time it")
        if has_branches(model.module):
            raise StepError(
                f"{model.spec.architecture} has branches that will be merged, which factors would prevent; put a "
                "reparameterize step before low_rank"
            )
        names = [name for name, _ in model.module.named_modules()]
        for name in self.exclude:
            if name not in names:
                raise StepError(
                    f"low_rank.exclude names {name!r}, and {model.spec.architecture} has no such layer"
                )
        cost = measured_cost(self.engine, 0 if run.target is None else run.target.num_threads)
        layers, reasons = self._survey(model, run, cost)
        search = Search(model, layers, reasons, run, self.latency)
        found = search.run()
        for line in report(found, len(layers) + len(reasons)):
            run.progress.message(line)
        run.log.write(0, found.figures)
        if not found.chosen or self.recover is None:
            return found.model
        return self.recover(found.model, run)

    def _survey(self, model: Model, run: Run, cost: Cost) -> tuple[dict[str, LayerOptions], dict[str, str]]:
        """Options of every layer that can be replaced, and why the others cannot."""
        spec, module = model.spec.input, model.module
        home, training = next(module.parameters()).device, module.training
        module.to(run.device).eval()
        example = torch.randn(1, spec.channels, *spec.size, generator=torch.Generator().manual_seed(run.seed))
        like = next(module.parameters())
        try:
            shapes, reasons = find_layers(module, example.to(like))
            for path in [path for path in shapes if self._is_excluded(path)]:
                del shapes[path]
                reasons[path] = "is excluded"
            if not shapes:
                raise StepError(
                    f"{model.spec.architecture} has no layer that can be factorised"
                    + "".join(f"; {path} {why}" for path, why in list(reasons.items())[:3])
                )
            found: dict[str, LayerOptions] = {}
            options = partial(
                layer_options,
                cost=cost,
                methods=self.methods,
                min_gain=self.min_gain,
                max_error=self.energy,
                step=run.channel_multiple,
            )
            paths = list(shapes)
            if self.whiten:
                batches, count = self._batches(model, run)
                few = min(count, SENSITIVITY_IMAGES)
                cares = sensitivities(module, paths, batches, few, run.seed)
                statistics = run.progress.track(
                    collect(module, paths, batches, count, run.seed), "low rank: fitting layers", len(paths)
                )
                for path, seen in statistics:
                    layer = module.get_submodule(path)
                    care = cares[path] * seen.output_variance(layer)
                    found[path] = options(layer, shapes[path], statistics=seen, sensitivity=care)
            else:
                for path in run.progress.track(paths, "low rank: fitting layers", len(paths)):
                    found[path] = options(module.get_submodule(path), shapes[path])
        finally:
            module.to(home).train(training)
        return found, reasons

    def _is_excluded(self, path: str) -> bool:
        return any(path == name or path.startswith(f"{name}.") for name in self.exclude)

    def _batches(self, model: Model, run: Run) -> tuple[Batches, int]:
        """The calibration images, normalised, and how many they are."""
        if run.data is None:
            raise StepError("low_rank fits its factors on images; pass data=…, or set whiten to false")
        split = run.data.train if run.data.train is not None else run.data.val
        if len(split) == 0:
            raise StepError(
                f"split {split.name!r} of {run.data.name} is empty; low_rank needs images to fit on"
            )
        split = split.subset(calibration_indices(split, self.images, run.seed), "calibration")
        like = next(model.module.parameters())
        odd = odd_images(model.module, [(images, None) for images in _walk(split, model.spec.input, like)])
        if bool(odd.any()):
            run.progress.message(f"low rank: {told(odd)}; nothing is fitted to them")
            split = split.subset(np.flatnonzero(~odd.numpy()), "calibration")
        return partial(_walk, split, model.spec.input, like), len(split)


def _walk(split: Split, spec: InputSpec, like: Tensor) -> Iterator[Tensor]:
    """Images (B, C, H, W) of a split, normalised, of the type and on the device of `like`."""
    for images, _ in split.evaluation_batches(spec, batch_size=BATCH):
        yield normalize(images, spec).to(like)


def measured_cost(engine: str, threads: int) -> Cost:
    """See `cveff.compress.low_rank_cost`; imported when asked, as it opens the table on disk."""
    from cveff.compress.low_rank_cost import measured_cost as make

    return make(engine, threads)
