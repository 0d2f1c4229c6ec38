"""`Quantize`: round a network's weights and activations to 8-bit integers, as the target's engine computes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from torch import Tensor

from cveff.backbones.reparameterize import Reparameterize, has_branches
from cveff.compress.quant.mixed import MixedPrecision
from cveff.compress.quant.network import is_cast, is_quantized
from cveff.compress.quant.points import Points
from cveff.compress.quant.post_training import PostTraining, Quantized, WeightRounding
from cveff.compress.quant.ranges import Method
from cveff.compress.quant.reduced import is_for_tensorrt, reduce_floats, reduce_rest
from cveff.compress.quant.reestimate import Correction
from cveff.compress.quant.report import Calibration
from cveff.compress.quant.weight_choice import is_packed
from cveff.compress.quant.weight_only import WeightOnly
from cveff.compress.quant.weight_step import WEIGHT_BITS, round_model_weights
from cveff.compress.samples import calibration_batches
from cveff.data.dataset import Split
from cveff.data.loading import load_images
from cveff.errors import StepError
from cveff.files import write_json
from cveff.model import Model
from cveff.runtime.machine import isa, saturates
from cveff.steps import Run
from cveff.target import Scheme

MIXED_FILE = "mixed_precision.json"
"""What "auto" measured and decided, in the step's folder."""

Precision = Literal["int8", "int8-weights", "int4-weights", "fp16", "bf16", "fp8", "auto"]

TRAINABLE: tuple[Precision, ...] = ("int8", "auto", "fp8")
"""Precisions whose roundings a `train` or `distill` step trains through."""

_ROUNDING = ("scheme", "method", "weight_method", "weights", "equalize", "correction", "saturation")

HEEDED: dict[Precision, tuple[str, ...]] = {
    "int8": (*_ROUNDING, "rest"),
    "auto": (*_ROUNDING, "max_accuracy_drop"),
    "int8-weights": ("weights", "group_size", "symmetric"),
    "int4-weights": ("weights", "group_size", "symmetric"),
    "fp16": (),
    "bf16": (),
    "fp8": ("rest",),
}
"""Settings that a precision takes notice of; all do of `images`, `exclude` and `calibration`."""


@dataclass(frozen=True)
class Quantize:
    """Post-training quantization; followed by a `distill` or `train` step it becomes quantization-aware training. The
    model that comes out computes in PyTorch what its exported file says: rounding included.

    Attributes:
        precision: "int8": weights and activations; "auto": floats, 8 bits, or 8 bits with some layers in floats,
            whichever is the fastest on the target's engine and loses at most `max_accuracy_drop`
            (`cveff.compress.quant.mixed`); "fp16", "bf16": all but what needs float32; "fp8": what "tensorrt"
            scheme rounds. Of the other settings these three heed `images` and `exclude` alone. "int8-weights",
            "int4-weights": weights of large linear layers alone (`cveff.compress.quant.weight_only`), by `weights`,
            `images`, `exclude` and the last two settings.
        scheme: where and how tensors are rounded (`cveff.compress.quant.placement`).
        rest: of "fp8", and of "int8" by the "tensorrt" scheme: what is not rounded computes in "fp32", or in "fp16" but
            for what needs float32. After quantization-aware training, `precision="fp16"` does the same to a network
            that is rounded so.
        method: how ranges of activations are found; "auto" takes the one that changes the logits least.
        weight_method: how those of weights are: "minmax", or "mse" for the least error.
        weights: "nearest", "compensated": errors of a layer's weights make up for each other (GPTQ), or "learned":
            block by block, which way each weight is rounded (AdaRound, BRECQ).
        equalize: move what makes tensors hard to round into the weights around them (cross-layer equalization,
            SmoothQuant); "auto" tries it behind layer norms, and keeps it where the logits change less.
        correction: bring the channels of each layer back to the statistics they have in floats, from front to back:
            "mean" (bias correction), "statistics" (deviations too, as batch norms estimated again would), "none", or
            "auto": what changes the logits least.
        saturation: "narrow" gives wider steps to channels whose 16-bit sums clip on x86 without VNNI; "ignore" does
            not; "auto" does if the target is such a processor, or without a target if this one is.
        images: most calibration images, in equal parts of every class where there are labels; fewer are used once
            ranges settle, and a quarter is for choosing only.
        calibration: a folder of images, labels not needed; by default the training images.
        exclude: operators that stay in floats, by names such as "stem.conv:conv2d:0" (a name that is wrong is answered
            with those that come close); of weights alone: layers' or modules' paths.
        group_size: of weights alone: inputs that share a scale, 32, 64 or 128.
        symmetric: of weights alone: no zero points.
        max_accuracy_drop: of "auto": points of top-1 accuracy on the validation images that may be lost; without
            labels, points of answers that differ.

    Raises:
        StepError: at construction, for a value out of range.
    """

    precision: Precision = "int8"
    scheme: Scheme = "cpu"
    rest: Literal["fp32", "fp16"] = "fp32"
    method: Method | Literal["auto"] = "auto"
    weight_method: Literal["minmax", "mse"] = "minmax"
    weights: WeightRounding = "compensated"
    equalize: bool | Literal["auto"] = "auto"
    correction: Correction | Literal["auto"] = "auto"
    saturation: Literal["auto", "narrow", "ignore"] = "auto"
    images: int = 512
    exclude: tuple[str, ...] = ()
    group_size: int = 64
    symmetric: bool = False
    max_accuracy_drop: float = 1.0
    calibration: Path | None = None

    kind: ClassVar[str] = "quantize"
    requires: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, allowed in (
            ("precision", get_args(Precision)),
            ("scheme", get_args(Scheme)),
            ("rest", ("fp32", "fp16")),
            ("method", (*get_args(Method), "auto")),
            ("weight_method", ("minmax", "mse")),
            ("weights", get_args(WeightRounding)),
            ("equalize", (True, False, "auto")),
            ("correction", (*get_args(Correction), "auto")),
            ("saturation", ("auto", "narrow", "ignore")),
        ):
            if getattr(self, name) not in allowed:
                raise StepError(
                    f"quantize.{name} is {getattr(self, name)!r}; give one of {', '.join(map(str, allowed))}"
                )
        if not 0 <= self.max_accuracy_drop <= 100:
            raise StepError(
                f"quantize.max_accuracy_drop is {self.max_accuracy_drop!r}; give points between 0 and 100"
            )
        if self.precision == "auto":
            object.__setattr__(self, "requires", ("data", "timer"))
        if self.rest != "fp32" and not (
            self.precision == "fp8" or (self.precision == "int8" and self.scheme == "tensorrt")
        ):
            raise StepError(
                f"quantize.rest is {self.rest!r} with precision {self.precision!r} and scheme {self.scheme!r}; only "
                "TensorRT's files have floats of 16 bits beside 8: give scheme='tensorrt', or rest='fp32'"
            )
        if self.images < 1:
            raise StepError(f"quantize.images is {self.images}; give 1 or more")
        if self.precision in WEIGHT_BITS:
            _ = self.weights_alone  # checks them

    @property
    def weights_alone(self) -> WeightOnly:
        """The settings of "int8-weights" and "int4-weights"."""
        bits = WEIGHT_BITS[self.precision]
        return WeightOnly(bits, self.group_size, self.symmetric, self.weights, self.exclude)  # type: ignore[arg-type]

    @property
    def needs_images(self) -> bool:
        """Whether calibration images are looked at."""
        return self.precision not in WEIGHT_BITS or self.weights != "nearest"

    def check_run(self, run: Run) -> None:
        """
        Raises:
            StepError: there are no images to calibrate with.
        """
        if not self.needs_images:
            return
        if self.precision == "auto" and (run.timer is None or run.data is None):
            raise StepError(
                "Quantize(precision='auto') times files and scores validation images; give a target with an fp32 "
                "candidate, and data"
            )
        if self.calibration is not None:
            if not Path(self.calibration).is_dir():
                raise StepError(
                    f"quantize.calibration {self.calibration} is not a folder; give a folder of images"
                )
            return
        if run.data is None:
            raise StepError(
                "Quantize needs data; pass data=… to cveff.apply, or Quantize(calibration=FOLDER) for images without "
                "labels"
            )
        if run.data.train is None:
            raise StepError(
                f"{run.data.name} has no training images to calibrate with; give data that has, or a folder of images "
                "(calibration)"
            )

    def __call__(self, model: Model, run: Run) -> Model:
        """As `quantized`, without what was found out."""
        return self.quantized(model, run)[0]

    def quantized(self, model: Model, run: Run) -> tuple[Model, Calibration]:
        """Merge branches, fold batch norms, place the roundings, find their steps and round the weights.

        Returns:
            the rounded model, and what its calibration images said.

        Raises:
            StepError: the model is quantized already, cannot be captured, or overflows on the calibration images.
            DataError, ImageError, InputSizeError: no calibration images, or such as the model cannot take.
        """
        rests = self.precision == "fp16" and is_for_tensorrt(model)
        if not rests and (is_quantized(model.module) or is_cast(model.module) or is_packed(model.module)):
            raise StepError(f"{model.spec.architecture} is quantized already; start from the float model")
        self.check_run(run)
        if self.precision in WEIGHT_BITS:
            split = self._split(run) if self.needs_images else None
            done = round_model_weights(model, run, self.weights_alone, self.images, split)
            used = Calibration() if split is None else Calibration(split.name, min(self.images, len(split)))
            return done, used
        if has_branches(model.module):
            model = Reparameterize()(model, run)
        split = self._split(run)
        images = calibration_batches(split, model.spec.input, self.images, seed=run.seed)
        count = sum(map(len, images))
        if rests:
            return reduce_rest(model, images, self.exclude, run.progress), Calibration(split.name, count)
        if self.precision in ("fp16", "bf16", "fp8"):
            method = "minmax" if self.precision == "fp8" else None
            reduced = reduce_floats(model, self.precision, images, self.exclude, run.progress)
            return self._finished(reduced, images, run), Calibration(split.name, count, method)
        work = PostTraining(
            scheme=self.scheme,
            method=self.method,
            weight_method=self.weight_method,
            weights=self.weights,
            equalize=self.equalize,
            correction=self.correction,
            narrow=self._narrows(run),
            exclude=self.exclude,
            seed=run.seed,
            progress=run.progress,
        )
        found = work.quantize(model.module, model.spec.input, images)
        if self.precision == "auto":
            return self._mixed(model, found, work, images, run), _described(split.name, found)
        return self._finished(found.of(model), images, run), _described(split.name, found)

    def _finished(self, model: Model, images: list[Tensor], run: Run) -> Model:
        return model if self.rest == "fp32" else reduce_rest(model, images, (), run.progress)

    def _mixed(
        self, model: Model, found: Quantized, work: PostTraining, images: list[Tensor], run: Run
    ) -> Model:
        assert run.data is not None and run.timer is not None
        points = Points.of(model.module, run.data.val, model.spec.input, seed=run.seed)
        mixed = MixedPrecision(work, run.timer, points, self.max_accuracy_drop).search(model, found, images)
        for line in mixed.lines():
            run.progress.message(line)
        if run.folder is not None:
            write_json(run.folder / MIXED_FILE, mixed.to_json())
        return model if mixed.quantized is None else mixed.quantized.of(model)

    def _narrows(self, run: Run) -> bool:
        if self.saturation == "auto":
            return saturates(isa() if run.target is None else run.target.instruction_sets)
        return self.saturation == "narrow"

    def _split(self, run: Run) -> Split:
        if self.calibration is not None:
            return load_images(self.calibration, progress=run.progress)
        assert run.data is not None
        assert run.data.train is not None
        return run.data.train


def _described(source: str, found: Quantized) -> Calibration:
    return Calibration(
        source=source,
        images=found.seen.images,
        method=found.method,
        error=found.error,
        equalized=found.equalized,
        narrowed=tuple(found.narrowed.items()),
        moved=found.seen.moved,
        unmoved=found.seen.unmoved,
        left_out=found.left_out,
        correction=found.correction,
    )
