"""How certain an exit is of its answer: one number an image, from its logits. An image leaves where it is enough.

Every gate grows with certainty and lies between 0 and 1, so an image leaves where it reaches the stage's threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from .errors import CveffError


def certainty(logits: np.ndarray, gate: str) -> np.ndarray:
    """How certain each answer is.

    Args:
        logits: (N, classes) float.
        gate: "confidence": the largest probability (MSDNet: Huang et al., ICLR 2018, section 4); "margin": the largest
            less the second; "entropy": 1 less the entropy over its maximum, log(classes) (BranchyNet: Teerapittayanon
            et al., ICPR 2016, algorithm 1).

    Returns:
        (N,) float64 in 0..1; nan where logits are not finite, which no threshold lets leave. With one class, 1.

    Raises:
        CveffError: an unknown gate.
    """
    if gate not in GATES:
        raise CveffError(f"gate {gate!r} is unknown; use one of {', '.join(GATES)}")
    values = np.asarray(logits, np.float64)
    if values.shape[-1] == 1:
        return np.where(np.isfinite(values[:, 0]), 1.0, np.nan)
    with np.errstate(invalid="ignore", under="ignore"):
        exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return GATES[gate](probabilities)


def _confidence(probabilities: np.ndarray) -> np.ndarray:
    largest: np.ndarray = probabilities.max(axis=-1)
    return largest


def _margin(probabilities: np.ndarray) -> np.ndarray:
    best = np.partition(probabilities, -2, axis=-1)
    difference: np.ndarray = best[:, -1] - best[:, -2]
    return difference


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    logarithms = np.log(np.where(probabilities > 0, probabilities, 1.0))
    entropy = -(probabilities * logarithms).sum(axis=-1)
    certain: np.ndarray = 1 - entropy / math.log(probabilities.shape[-1])
    return certain


GATES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "confidence": _confidence,
    "entropy": _entropy,
    "margin": _margin,
}
"""By name; each takes probabilities (N, classes)."""
