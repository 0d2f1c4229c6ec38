"""Accuracy, agreement and their uncertainty, from logits that a predictor gave. numpy only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from cveff.errors import CveffError, EngineError
from cveff.measure.predictor import Predictor

Batch = tuple[np.ndarray, np.ndarray | None]


def predict(predictor: Predictor, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray | None]:
    """Run `predictor` over every batch.

    Args:
        predictor: uint8 (N, H, W, C) -> logits (N, classes).
        batches: pairs of images uint8 (N, H, W, C) and targets int64 (N,), or None where there are no labels.

    Returns:
        logits (total, classes) float32, and targets (total,) int64 or None.

    Raises:
        CveffError: there is no image, or only some batches have targets.
        EngineError: the logits of some image are not finite, or have the wrong shape; its position is named.
    """
    logits: list[np.ndarray] = []
    targets: list[np.ndarray | None] = []
    num_images = 0
    for images, batch_targets in batches:
        batch_logits = np.asarray(predictor(images), dtype=np.float32)
        if batch_logits.ndim != 2 or len(batch_logits) != len(images):
            raise EngineError(
                f"the predictor returned shape {batch_logits.shape} for {len(images)} images; "
                "it must return logits (N, classes)"
            )
        finite = np.isfinite(batch_logits).all(axis=1)
        if not finite.all():
            raise EngineError(
                f"logits of image {num_images + int(np.argmin(finite))} are not finite; "
                "the file overflows on this engine or its weights are damaged"
            )
        logits.append(batch_logits)
        targets.append(None if batch_targets is None else np.asarray(batch_targets, dtype=np.int64))
        num_images += len(images)
    if not num_images:
        raise CveffError("there are no images to predict; give at least one batch")
    known = [values for values in targets if values is not None]
    if known and len(known) != len(targets):
        raise CveffError(
            "some batches have targets and some have none; give targets for all of them or for none"
        )
    return np.concatenate(logits), np.concatenate(known) if known else None


def top1(logits: np.ndarray, targets: np.ndarray) -> float:
    """Share of images whose largest logit is the target's, in [0, 1]; on a tie the lower class wins.

    Args:
        logits: (N, classes). targets: (N,) integers.
    """
    _check(logits, targets)
    return float(np.mean(logits.argmax(axis=1) == targets))


def topk(logits: np.ndarray, targets: np.ndarray, k: int) -> float:
    """Share of images whose target is among the k largest logits; ties are broken as in `top1`."""
    _check(logits, targets)
    if not 1 <= k <= logits.shape[1]:
        raise CveffError(f"k is {k}; give 1 to {logits.shape[1]}, the number of classes")
    own = logits[np.arange(len(targets)), targets][:, None]
    earlier = np.arange(logits.shape[1]) < targets[:, None]
    rank = (logits > own).sum(axis=1) + ((logits == own) & earlier).sum(axis=1)
    return float(np.mean(rank < k))


def agreement(logits: np.ndarray, others: np.ndarray) -> float:
    """Share of images on which two predictors give the same top-1 class, in [0, 1].

    Args:
        logits, others: (N, classes), of the same images.
    """
    if logits.shape != others.shape or logits.ndim != 2 or not len(logits):
        raise CveffError(
            f"logits have shapes {logits.shape} and {others.shape}; give two equal (N, classes), N > 0"
        )
    return float(np.mean(logits.argmax(axis=1) == others.argmax(axis=1)))


def confusion(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Count of images by (true class, predicted class): (classes, classes) int64."""
    _check(logits, targets)
    num_classes = logits.shape[1]
    flat = targets * num_classes + logits.argmax(axis=1)
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_accuracy(matrix: np.ndarray) -> tuple[float | None, ...]:
    """Recall of every class from a `confusion` matrix; None for a class without images."""
    counts = matrix.sum(axis=1)
    return tuple(float(matrix[i, i] / count) if count else None for i, count in enumerate(counts))


def wilson_interval(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927): sound for small counts and near 0 and 1.

    Args:
        share: observed proportion. count: number of independent images it was observed on.

    Returns:
        (low, high), within [0, 1].
    """
    if count < 1 or not 0 <= share <= 1 or not 0 < confidence < 1:
        raise CveffError(f"no interval for share {share}, count {count}, confidence {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # The interval holds the share; rounding must not push it out at 0 and 1.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


@dataclass(frozen=True)
class Accuracy:
    """What a predictor scores on labelled images.

    Attributes:
        top1: share of images, in [0, 1]; `interval` is its 95% Wilson interval.
        top5: None with five classes or fewer.
        per_class: recall by class; None for a class without images.
        confusion: (classes, classes) int64, rows are true classes.
    """

    top1: float
    interval: tuple[float, float]
    top5: float | None
    num_images: int
    per_class: tuple[float | None, ...]
    confusion: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "top1": self.top1,
            "interval": list(self.interval),
            "top5": self.top5,
            "num_images": self.num_images,
            "per_class": list(self.per_class),
            "confusion": self.confusion.tolist(),
        }


def evaluate(logits: np.ndarray, targets: np.ndarray) -> Accuracy:
    """Every accuracy figure of logits (N, classes) against targets (N,)."""
    share, matrix = top1(logits, targets), confusion(logits, targets)
    return Accuracy(
        top1=share,
        interval=wilson_interval(share, len(targets)),
        top5=topk(logits, targets, 5) if logits.shape[1] > 5 else None,
        num_images=len(targets),
        per_class=per_class_accuracy(matrix),
        confusion=matrix,
    )


@dataclass(frozen=True)
class Change:
    """How accuracy moved between two predictors on the same images.

    Attributes:
        difference: new top-1 minus old, in [-1, 1]; multiply by 100 for points.
        interval: 95% interval of it; narrow, because images both get right or both get wrong cancel.
        gained, lost: number of images only the new, only the old predictor gets right.
    """

    difference: float
    interval: tuple[float, float]
    gained: int
    lost: int


def change(logits: np.ndarray, reference_logits: np.ndarray, targets: np.ndarray) -> Change:
    """Paired change of top-1 from `reference_logits` to `logits`, both (N, classes)."""
    _check(logits, targets)
    _check(reference_logits, targets)
    right = logits.argmax(axis=1) == targets
    reference_right = reference_logits.argmax(axis=1) == targets
    gained, lost = int((right & ~reference_right).sum()), int((reference_right & ~right).sum())
    count = len(targets)
    difference = (gained - lost) / count
    half = 1.96 * math.sqrt(max(0.0, gained + lost - (gained - lost) ** 2 / count)) / count
    return Change(difference, (max(-1.0, difference - half), min(1.0, difference + half)), gained, lost)


def _check(logits: np.ndarray, targets: np.ndarray) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not len(targets):
        raise CveffError(
            f"logits have shape {logits.shape} and targets {targets.shape}; give (N, classes) and (N,), N > 0"
        )
    if targets.min() < 0 or targets.max() >= logits.shape[1]:
        raise CveffError(
            f"targets run from {targets.min()} to {targets.max()}, but the logits have {logits.shape[1]} "
            "classes; the data's labels are not the model's"
        )
