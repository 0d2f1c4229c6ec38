"""The 8-bit files of one model: calibrated once in PyTorch, written for each engine when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cveff.compress.quant.calibration_images import odd_images
from cveff.compress.quant.describe import describe
from cveff.compress.quant.mixed import FP32, INT8, MIXED, Mixed, MixedPrecision
from cveff.compress.quant.network import is_quantized
from cveff.compress.quant.points import Points
from cveff.compress.quant.post_training import PostTraining, Quantized
from cveff.compress.quant.ranges import rounding_off
from cveff.compress.quant.reduced import reduce_floats, reduce_rest
from cveff.compress.quant.saturation import predict_saturation
from cveff.compress.samples import mixed as shuffled
from cveff.data.augment import normalize
from cveff.data.dataset import Split
from cveff.errors import ExportError
from cveff.export.clipping import Clipping
from cveff.export.onnx import export
from cveff.export.timer import EngineTimer
from cveff.model import Model
from cveff.progress import Progress, Silent
from cveff.target import Scheme, Target

BATCH = 32
ENOUGH = 0.67
"""Share of floats' time at which 8 bits throughout are taken as they are, and no mixture is searched for."""
DESCRIBED = 2
"""Batches that the report's costs are measured on."""


class NotWorthwhileError(ExportError):
    """A file was not written because it would be another one over again."""


@dataclass
class Int8:
    """What quantizes a model at most once, however many files are made from it.

    Attributes:
        model: its branches merged; left as it is. One that is quantized already is written as it is.
        images: (N, H, W, C) uint8 to calibrate on; None where no file in integers is wanted.
        folder: where files are written.
        selection: images that mixed precision is chosen by.
        max_accuracy_drop: points on them that it may lose.
        scheme: how tensors are rounded in files for ONNX Runtime (`cveff.target.Scheme`).
        clips: whether the device's integer kernels clip 16-bit sums (x86 without VNNI): channels are narrowed then.
        exported: the model's file in float32, where there is one.
    """

    model: Model
    images: np.ndarray | None
    folder: Path
    selection: Split
    max_accuracy_drop: float
    scheme: Scheme = "cpu"
    clips: bool = False
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    exported: Path | None = None
    _found: Quantized | None = field(default=None, init=False, repr=False)
    _written: dict[Path, Quantized] = field(default_factory=dict, init=False, repr=False)
    _described: dict[Path, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)

    @property
    def is_given(self) -> bool:
        """Whether the model came in quantized."""
        return is_quantized(self.model.module)

    @property
    def calibration(self) -> np.ndarray:
        """`images`.

        Raises:
            ExportError: there are none.
        """
        if self.images is None or not len(self.images):
            raise ExportError("int8 needs calibration images")
        return self.images

    def onnx(self) -> Path:
        """The model with its tensors and weights rounded, in Q/DQ form.

        Raises:
            ExportError: no calibration images, or the file does not hold what was simulated.
            StepError: the model cannot be captured, or overflows on the images.
        """
        path = self.folder / "model.int8.onnx"
        return path if path.exists() else self._write(path, self._quantized())

    def mixed(self, target: Target) -> Path:
        """The same with some layers in floats: those that are faster so, or lose too much.

        Args:
            target: gives the threads and the batch size that times are measured at, on ONNX Runtime.

        Raises:
            NotWorthwhileError: all layers belong in 8 bits, or all in floats.
            ExportError, StepError: as `onnx`.
        """
        path = self.folder / "model.int8-mixed.onnx"
        if path.exists():
            return path
        found = self._quantized()
        points = Points.of(self.model.module, self.selection, self.model.spec.input, seed=self.seed)
        with EngineTimer(target, "onnxruntime") as timer:
            timer.use(found.of(self.model), self.onnx())
            if self.exported is not None:
                timer.use(self.model, self.exported)
            search = MixedPrecision(self._work(), timer, points, self.max_accuracy_drop, ENOUGH)
            mixed = search.search(self.model, found, self._batches())
        for line in mixed.lines():
            self.progress.message(line)
        if mixed.chosen != MIXED or mixed.quantized is None:
            raise NotWorthwhileError(f"not built: {_why_not(mixed)}")
        return self._write(path, mixed.quantized, mixed)

    def tensorrt(self, precision: str) -> Path:
        """The model in the types that TensorRT computes in: "fp16", "bf16", or "fp8" and "int8" with the rest in fp16.

        Raises:
            ExportError: no calibration images, or the graph is none that TensorRT takes.
            StepError: the model cannot be captured, or overflows on the images.
        """
        path = self.folder / f"model.tensorrt-{precision}.onnx"
        if not path.exists():
            spec, batches = self.model.spec.input, self._batches()
            if precision == "int8":
                work = PostTraining(scheme="tensorrt", seed=self.seed, progress=self.progress)
                model = work.quantize(self.model.module, spec, batches).of(self.model)
            else:
                model = reduce_floats(self.model, precision, batches, progress=self.progress)  # type: ignore[arg-type]
            if precision in ("int8", "fp8"):
                model = reduce_rest(model, batches, progress=self.progress)
            export(model, path)
        return path

    def rounded_weights(self) -> Path:
        """A float32 file whose weights lie on the grids that were chosen for them: for quantizers of other engines."""
        path = self.folder / "model.rounded.onnx"
        if not path.exists():
            found = self._quantized()
            # Other quantizers round activations in steps of their own, and correct for those.
            with found.uncorrected() as graph, rounding_off(graph):
                export(Model(self.model.spec, graph), path)
        return path

    def usual_images(self) -> np.ndarray:
        """`calibration`, less the images that the ranges were made without: for quantizers of other engines."""
        if not self._quantized().left_out:
            return self.calibration
        batches = normalize(self.calibration, self.model.spec.input).split(BATCH)
        return self.calibration[~odd_images(self._quantized().exact, batches).numpy()]

    def described(self, path: Path) -> Mapping[str, Any] | None:
        """What is rounded in a file that this has written with its roundings, and what each costs; else None."""
        return self._described.get(path)

    def clipping(self, path: Path) -> Clipping | None:
        """What clips in a file that this has written, predicted from the images; None where the device does not clip.

        Raises:
            ExportError: there are no images.
        """
        if not self.clips:
            return None
        found = self._written.get(path)
        graph: Any = self.model.module if found is None else found.graph
        left = predict_saturation(graph, self._batches(), seed=self.seed)
        narrowed = {} if found is None else found.narrowed
        return Clipping.of("none" if self.is_given else "narrow", narrowed, left, len(self.calibration))

    def _write(self, path: Path, found: Quantized, mixed: Mixed | None = None) -> Path:
        export(found.of(self.model), path)
        self._written[path] = found
        self._described[path] = describe(found, self._batches()[:DESCRIBED], mixed=mixed, seed=self.seed)
        return path

    def _quantized(self) -> Quantized:
        if self._found is None:
            self._found = self._work().quantize(self.model.module, self.model.spec.input, self._batches())
        return self._found

    def _work(self) -> PostTraining:
        return PostTraining(scheme=self.scheme, narrow=self.clips, seed=self.seed, progress=self.progress)

    def _batches(self) -> list[Tensor]:
        return shuffled(normalize(self.calibration, self.model.spec.input), BATCH, self.seed)


def _why_not(mixed: Mixed) -> str:
    if mixed.chosen == INT8 and not mixed.parts:
        share = mixed.milliseconds[INT8] / mixed.milliseconds[FP32]
        return f"8 bits throughout take {100 * share:.0f}% of floats' time and keep to the limit"
    other = "8 bits" if mixed.chosen == INT8 else "floats"
    return f"{other} throughout are as fast as any mixture, and keep to the limit"
