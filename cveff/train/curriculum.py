"""Easy images first: a pool that grows with training, from a stored difficulty of each image.

DeepSpeed Data Efficiency (Li et al., arXiv:2212.03597, section 3.1; competence of Platanios et al.,
arXiv:1903.09848): at the share t of the run, samples are drawn evenly from those of difficulty up to d(t).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cveff.data.randomness import generator
from cveff.errors import TrainingError
from cveff.train.difficulty import require_metric

_POOL = 32


@dataclass(frozen=True)
class Curriculum:
    """Which images training draws from, and when.

    Attributes:
        metrics: what difficulty is, by names of `cveff.train.difficulty`; or files that `measure_difficulty` kept, of
            these very images.
        combine: of several metrics, "mean" of the places in their orders, or "max": an image is drawn once every
            metric allows it.
        by: "percentile", d is a share of the images; or "value", d is a share of the way from the least difficulty
            to the greatest.
        start: d at the beginning.
        until: share of the run after which every image is drawn.
        beta: d = start + (1 - start) · (t / until)^beta; 1 is linear, 0.5 the root.
        balanced: order within each class, so that every class has its share in the pool; by percentile only.
    """

    metrics: tuple[str, ...] = ("loss",)
    combine: Literal["mean", "max"] = "mean"
    by: Literal["percentile", "value"] = "percentile"
    start: float = 0.3
    until: float = 0.5
    beta: float = 1.0
    balanced: bool = True

    def __post_init__(self) -> None:
        if not self.metrics:
            raise TrainingError("curriculum.metrics is empty; give one or more, such as 'loss'")
        for metric in self.metrics:
            if not is_file(metric):
                require_metric(metric, "curriculum.metrics")
        if self.combine not in ("mean", "max"):
            raise TrainingError(f"curriculum.combine is {self.combine!r}; give 'mean' or 'max'")
        if self.by not in ("percentile", "value"):
            raise TrainingError(f"curriculum.by is {self.by!r}; give 'percentile' or 'value'")
        for name in ("start", "until"):
            if not 0 < getattr(self, name) <= 1:
                raise TrainingError(f"curriculum.{name} is {getattr(self, name)!r}; give a share in (0, 1]")
        if not 0 < self.beta < float("inf"):
            raise TrainingError(f"curriculum.beta is {self.beta!r}; give a positive number")

    def allowed(self, share: float) -> float:
        """d in [start, 1] once `share` of the run is over."""
        return self.start + (1 - self.start) * min(1.0, max(0.0, share) / self.until) ** self.beta


def is_file(metric: str) -> bool:
    """Whether a metric is the path of a stored one."""
    return metric.endswith(".safetensors")


class Pool:
    """Images in the order in which a curriculum lets them in.

    Args:
        difficulties: (N,) float for each of `settings.metrics`.
        targets: (N,) int64.

    Attributes:
        order: (N,) int64, indices of images, easiest first.
        levels: (N,) float64 in [0, 1], ascending: the d at which each of `order` is let in.
    """

    def __init__(self, settings: Curriculum, difficulties: Sequence[np.ndarray], targets: np.ndarray) -> None:
        self.settings = settings
        groups = targets if settings.balanced and settings.by == "percentile" else np.zeros_like(targets)
        scale = percentiles if settings.by == "percentile" else _scaled
        combined = np.stack([scale(values, groups) for values in difficulties])
        levels = combined.max(axis=0) if settings.combine == "max" else combined.mean(axis=0)
        if settings.combine == "mean" and settings.by == "percentile":
            levels = percentiles(
                levels, groups
            )  # a mean of places is no place: d is to be a share of the images
        self.order = np.argsort(levels, kind="stable")
        self.levels = levels[self.order]

    def size(self, share: float, batch_size: int) -> int:
        """Images that may be drawn once `share` of the run is over; never fewer than a batch, if there are so many."""
        allowed = self.settings.allowed(share)
        count = int(np.searchsorted(self.levels, allowed + 1e-9, side="right"))
        return min(len(self.order), max(count, batch_size)) if allowed < 1 else len(self.order)

    def draw(self, share: float, batch_size: int, *key: int) -> np.ndarray | None:
        """Indices of a batch, (batch_size,) int64, by `key` alone; None once every image may be drawn."""
        size = self.size(share, batch_size)
        if size == len(self.order):
            return None
        return self.order[generator(_POOL, *key).choice(size, batch_size, replace=False)]


def percentiles(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Place of each value among those of its group, (N,) float64 in (0, 1]; equal values in the order they come."""
    places = np.empty(len(values))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        places[members[np.argsort(values[members], kind="stable")]] = np.arange(1, len(members) + 1) / len(
            members
        )
    return places


def _scaled(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Values from 0 for the least to 1 for the greatest; `groups` is for `percentiles`."""
    least, greatest = float(values.min()), float(values.max())
    return (values - least).astype(np.float64) / ((greatest - least) or 1.0)
