"""The 8-bit files of one model: calibrated once in PyTorch, written for each engine when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cveff.compress.quant.network import QuantizedGraph, is_quantized
from cveff.compress.quant.post_training import PostTraining, Quantized
from cveff.compress.quant.ranges import rounding_off
from cveff.compress.quant.saturation import saturates
from cveff.compress.samples import mixed
from cveff.data.augment import normalize
from cveff.errors import ExportError
from cveff.export.onnx import export
from cveff.model import Model, with_module
from cveff.progress import Progress, Silent

BATCH = 32


@dataclass
class Int8:
    """What quantizes a model at most once, however many files are made from it.

    Attributes:
        model: its branches merged; left as it is. One that is quantized already is written as it is.
        images: (N, H, W, C) uint8 to calibrate on; None where no file in integers is wanted.
        folder: where files are written.
    """

    model: Model
    images: np.ndarray | None
    folder: Path
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    _found: Quantized | None = field(default=None, init=False, repr=False)

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
        if not path.exists():
            found = self._quantized()
            edit = QuantizedGraph.of(self.model.spec.input, found.placement)
            export(with_module(self.model, found.graph, edit), path)
        return path

    def rounded_weights(self) -> Path:
        """A float32 file whose weights lie on the grids that were chosen for them: for quantizers of other engines."""
        path = self.folder / "model.rounded.onnx"
        if not path.exists():
            found = self._quantized()
            with rounding_off(found.graph):
                export(Model(self.model.spec, found.graph), path)
        return path

    def _quantized(self) -> Quantized:
        if self._found is None:
            spec = self.model.spec.input
            batches = mixed(normalize(self.calibration, spec), BATCH, self.seed)
            work = PostTraining(narrow=saturates(), seed=self.seed, progress=self.progress)
            self._found = work.quantize(self.model.module, spec, batches)
        return self._found
