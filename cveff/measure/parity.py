"""How far two arrays, or two runs of the same layers, are from each other. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cveff.errors import CveffError


def relative_difference(values: np.ndarray, reference: np.ndarray) -> float:
    """`max|values - reference| / max|reference|`; infinite where a value is not finite in one of them only.

    Equal arrays give 0, also where both are all zero; anything else against all zeros is infinite.
    """
    comparison = Comparison()
    comparison.add(values, reference)
    return comparison.relative_difference


def cosine(values: np.ndarray, reference: np.ndarray) -> float:
    """Cosine of the angle between two arrays read as vectors, in [-1, 1]; exactly 1 for equal arrays."""
    comparison = Comparison()
    comparison.add(values, reference)
    return comparison.cosine


class Comparison:
    """The two figures above, over arrays that arrive piece by piece."""

    def __init__(self) -> None:
        self._difference = self._reference = 0.0
        self._dot = self._square = self._reference_square = 0.0
        self._finite = True

    def add(self, values: np.ndarray, reference: np.ndarray) -> None:
        """Take in two arrays of the same shape, of any dtype.

        Raises:
            CveffError: the shapes differ.
        """
        if values.shape != reference.shape:
            raise CveffError(f"cannot compare arrays of shapes {values.shape} and {reference.shape}")
        a, b = values.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            # NaN equals NaN here, and an infinity its like: both sides then say the same.
            self._finite &= bool(np.array_equal(a[~finite], b[~finite], equal_nan=True))
            a, b = a[finite], b[finite]
        if a.size:
            self._difference = max(self._difference, float(np.abs(a - b).max()))
            self._reference = max(self._reference, float(np.abs(b).max()))
            self._dot += float(a @ b)
            self._square += float(a @ a)
            self._reference_square += float(b @ b)

    @property
    def relative_difference(self) -> float:
        """See the function of this name."""
        if not self._finite:
            return math.inf
        if self._difference == 0:
            return 0.0
        return self._difference / self._reference if self._reference else math.inf

    @property
    def cosine(self) -> float:
        """See the function of this name."""
        if self._difference == 0:
            return 1.0  # exactly: rounding in the sums would leave a trace
        norm = math.sqrt(self._square) * math.sqrt(self._reference_square)
        return min(1.0, max(-1.0, self._dot / norm)) if norm else 0.0


@dataclass(frozen=True)
class LayerParity:
    """One layer's output in two runs.

    Attributes:
        name: the tensor's name in the reference graph, or the module's in a PyTorch network.
        op: the operator or the module's class.
        relative_difference: `max|other - reference| / max|reference|` over all images.
        cosine: between the two, read as vectors.
        module: path of the PyTorch module the layer came from; "" where the file does not say.
    """

    name: str
    op: str
    relative_difference: float
    cosine: float
    module: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a difference that is not finite becomes null."""
        finite = math.isfinite(self.relative_difference)
        return {**vars(self), "relative_difference": self.relative_difference if finite else None}


def first_large_difference(layers: Sequence[LayerParity], threshold: float) -> LayerParity | None:
    """The first layer, in the order of execution, past `threshold`; None where there is none."""
    return next((layer for layer in layers if layer.relative_difference > threshold), None)


def largest_rise(layers: Sequence[LayerParity]) -> LayerParity | None:
    """The layer that adds most to the difference: where 1 - cosine rises most above the largest before it.

    In a quantized network every layer differs a little, and differences carry on downstream; what the reader
    looks for is the layer where the error is made. None for no layers.
    """
    best, best_rise, so_far = None, -math.inf, 0.0
    for layer in layers:
        error = 1 - layer.cosine
        if error - so_far > best_rise:
            best, best_rise = layer, error - so_far
        so_far = max(so_far, error)
    return best
