"""What the sections of choices.py share: models, exported files and images made once, and interleaved timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers
import photos
from engines import Timed, settled_model

import cveff
from cveff.compress.quant.post_training import PostTraining
from cveff.data.augment import normalize
from cveff.export.openvino import convert
from cveff.measure import compare
from cveff.model import Model
from cveff.runtime.preprocess import preprocess

CALIBRATION, HELD_OUT = 32, 32
"""Crops of photographs: those that int8 is calibrated on, and others that it is compared on."""
THREADS = 1
"""Of every engine: more would spin while they wait, and CPU time would count that."""

Opener = Callable[[], Callable[[np.ndarray], Any]]
"""Opens a file and returns what is timed: a callable on the uint8 batch."""


@dataclass
class Workshop:
    """A folder of files that several sections use.

    Attributes:
        seconds: CPU time of one comparison.
        quick: sections look at their first model and at batch 1 alone.
    """

    folder: Path
    seconds: float
    quick: bool = False
    _models: dict[str, Model] = field(default_factory=dict, repr=False)

    def some(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The models a section looks at."""
        return names[:1] if self.quick else names

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that are timed."""
        return (1,) if self.quick else (1, 8)

    def model(self, name: str) -> Model:
        """Random weights, batch norms settled, branches merged."""
        if name not in self._models:
            self._models[name] = settled_model(name)
        return self._models[name]

    def exported(self, name: str) -> Path:
        """cveff's own ONNX file: uint8 NHWC, normalisation inside."""
        path = self.folder / f"{name}.onnx"
        return path if path.exists() else cveff.export(self.model(name), path)

    def rounded(self, name: str) -> Path:
        """cveff's int8 file, calibrated on `calibration`."""
        path, model = self.folder / f"{name}.int8.onnx", self.model(name)
        if path.exists():
            return path
        batches = list(normalize(self.calibration(name), model.spec.input).split(16))
        rounded = PostTraining().quantize(model.module, model.spec.input, batches)
        return cveff.export(rounded.of(model), path)

    def plain(self, name: str) -> Path:
        """The exporter's ONNX file: float NCHW, already normalised."""
        path = self.folder / f"{name}.plain.onnx"
        model = self.model(name)
        return path if path.exists() else peers.plain_export(model.module, model.spec.input, path)

    def openvino(self, name: str) -> Path:
        """cveff's file as OpenVINO IR, float32."""
        path = self.folder / f"{name}.xml"
        return path if path.exists() else convert(self.exported(name), path)

    def calibration(self, name: str) -> np.ndarray:
        """uint8 (N, H, W, C)."""
        return self._crops(name, CALIBRATION, seed=0)

    def held_out(self, name: str) -> np.ndarray:
        """Other crops of the same photographs, uint8 (N, H, W, C)."""
        return self._crops(name, HELD_OUT, seed=1000)

    def _crops(self, name: str, count: int, seed: int) -> np.ndarray:
        spec = self.model(name).spec.input
        return preprocess(photos.crops(photos.photographs(), count, spec, seed), spec)

    def times(self, openers: Mapping[str, Opener], images: np.ndarray, reference: str) -> dict[str, Any]:
        """Open every file and time all of them on one batch, interleaved.

        Files run on one thread and the clock is the process's CPU time: on a quiet machine that is the time one waits,
        and on a shared one it leaves out what other programs take.

        Args:
            openers: each opens its file with `THREADS` threads.
            images: uint8 (N, H, W, C), what every predictor is called with.
            reference: whose time the ratios are relative to: above 1 is slower than it.
        """
        result = compare(
            {name: Timed(opener(), THREADS) for name, opener in openers.items()},
            images,
            reference=reference,
            budget_seconds=self.seconds,
            min_rounds=7,
            precision=0.0,  # never stops early, so every ratio has enough rounds
            clock=time.process_time,
        )
        return {
            "batch": len(images),
            "reference": reference,
            "median_ms": {name: item.median_ms for name, item in result.items()},
            "ratio": {name: result.ratio(reference, name).to_json() for name in openers},
            "rounds": result.rounds,
            "load_average": result.load,
        }


def run_all(call: Callable[[np.ndarray], Any], images: np.ndarray) -> np.ndarray:
    """Logits (N, classes) of images given one by one, so that no engine sees a batch of another size."""
    return np.concatenate([np.asarray(call(images[index : index + 1])) for index in range(len(images))])


def centred_cosine(logits: np.ndarray, expected: np.ndarray) -> float:
    """Cosine between two (N, classes), each less its mean over the images: what all images share says nothing."""
    a, b = (
        (values - values.mean(0, keepdims=True)).astype(np.float64).ravel() for values in (logits, expected)
    )
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def variation_error(logits: np.ndarray, expected: np.ndarray) -> float:
    """Size of the error over the size of the variation between images: |logits - expected| / |expected - mean|."""
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected - expected.mean(0)))
