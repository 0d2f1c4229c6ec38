"""Importance sampling: images from which more is to be learned are drawn more often, and count for less each time, so
that the expected gradient is that of the whole set (Katharopoulos & Fleuret, arXiv:1803.00942)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cveff.data.randomness import generator
from cveff.errors import TrainingError
from cveff.train.difficulty import require_metric

_DRAW = 33


@dataclass(frozen=True)
class Importance:
    """Draw images from which more is to be learned more often.

    With replacement, by p = (1 - uniform) · difficulty / sum + uniform / N.

    Attributes:
        metric: what difficulty is (`cveff.train.difficulty`); "el2n" is close to the norm of an image's gradient.
        uniform: share of the draws that is even; an image's weight is at most 1 / uniform.
    """

    metric: str = "el2n"
    uniform: float = 0.3

    def __post_init__(self) -> None:
        require_metric(self.metric, "importance.metric")
        if not 0 < self.uniform <= 1:
            raise TrainingError(f"importance.uniform is {self.uniform!r}; give a share in (0, 1]")


class ImportanceDraw:
    """Batches by importance.

    Args:
        difficulty: (N,) float; what is below 0 counts from the least on.

    Attributes:
        probabilities: (N,) float64, summing to 1.
    """

    def __init__(self, settings: Importance, difficulty: np.ndarray) -> None:
        worth = difficulty.astype(np.float64) - min(0.0, float(difficulty.min()))
        total, even = float(worth.sum()), np.full(len(worth), 1 / len(worth))
        by_worth = worth / total if total else even
        self.probabilities = (1 - settings.uniform) * by_worth + settings.uniform * even
        self._ends = np.cumsum(self.probabilities)

    def draw(self, batch_size: int, *key: int) -> np.ndarray:
        """Indices of a batch, (batch_size,) int64, by `key` alone; one image may come twice."""
        drawn = generator(_DRAW, *key).random(batch_size) * self._ends[-1]
        return np.minimum(np.searchsorted(self._ends, drawn, side="right"), len(self._ends) - 1)

    def weights(self, indices: np.ndarray) -> Tensor:
        """What each image's loss is multiplied by, (B,) float32: 1 / (N p)."""
        return torch.from_numpy((1 / (len(self._ends) * self.probabilities[indices])).astype(np.float32))


def weighted(targets: Tensor, weights: Tensor, num_classes: int, label_smoothing: float) -> Tensor:
    """Targets whose cross-entropy is `weights` times that of `targets` under label smoothing.

    Args:
        targets: (B,) int64.
        weights: (B,) float32.

    Returns:
        (B, num_classes) float32; rows sum to the weights.
    """
    smooth = F.one_hot(targets, num_classes).float() * (1 - label_smoothing) + label_smoothing / num_classes
    return smooth * weights[:, None]
