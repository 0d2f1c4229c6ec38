"""From boxes and scores to detections: torchvision's post-processing in numpy.

The rule is that of torchvision's SSD and RetinaNet: a score threshold, the best candidates of each group, greedy
non-maximum suppression within each class, the best detections of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .errors import CveffError

GROUPS = ("class", "level")
Detections = dict[str, np.ndarray]
"""Of one image, most certain first: `boxes` (D, 4) float32, `scores` (D,) float32, `labels` (D,) int64."""


@dataclass(frozen=True)
class Suppression:
    """How boxes and scores become detections.

    Attributes:
        score_threshold: a candidate's score must be above it.
        iou_threshold: of two boxes of one class that overlap more, the less certain one goes; intersection over union.
        max_candidates: the most of each group that are looked at.
        max_detections: the most of an image.
        group_by: "class" (SSD: boxes of one class) or "level" (RetinaNet: boxes and classes of one pyramid level).
        levels: boxes of each pyramid level, in order.
        first_class: classes before it are background and never detected.
    """

    score_threshold: float
    iou_threshold: float
    max_candidates: int
    max_detections: int
    group_by: str
    levels: tuple[int, ...]
    first_class: int = 0

    def __post_init__(self) -> None:
        for name in ("score_threshold", "iou_threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise CveffError(f"{name} is {value!r}; give a number between 0 and 1")
        for name in ("max_candidates", "max_detections"):
            if not _is_count(getattr(self, name), 1):
                raise CveffError(f"{name} is {getattr(self, name)!r}; give a positive integer")
        if self.group_by not in GROUPS:
            raise CveffError(f"group_by is {self.group_by!r}; use one of {', '.join(GROUPS)}")
        if not self.levels or not all(_is_count(level, 1) for level in self.levels):
            raise CveffError(f"levels is {self.levels!r}; give the boxes of each level, positive integers")
        if not _is_count(self.first_class, 0):
            raise CveffError(f"first_class is {self.first_class!r}; give an integer of 0 or more")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is its inverse."""
        return {**asdict(self), "levels": list(self.levels)}

    @classmethod
    def from_json(cls, values: Any) -> Suppression:
        """Rebuild from `to_json`'s output.

        Raises:
            CveffError: a key is unknown or missing, or a value is of a wrong type or out of range.
        """
        names = set(cls.__dataclass_fields__)
        if not isinstance(values, Mapping) or set(values) != names or not isinstance(values["levels"], list):
            raise CveffError(f"suppression is {values!r:.200}; it must hold {', '.join(sorted(names))}")
        return cls(**{**values, "levels": tuple(values["levels"])})


def suppress(boxes: np.ndarray, scores: np.ndarray, settings: Suppression) -> Detections:
    """The detections of one image.

    Args:
        boxes: (A, 4) float32, left, top, right, bottom in pixels.
        scores: (A, classes) float32 in [0, 1].

    Raises:
        CveffError: the arrays do not fit each other or `settings.levels`.
    """
    if boxes.shape != (len(scores), 4) or scores.ndim != 2 or len(scores) != sum(settings.levels):
        raise CveffError(
            f"boxes {boxes.shape} and scores {scores.shape} do not fit each other and {sum(settings.levels)} anchors"
        )
    rows, labels = _candidates(scores, settings)
    values = scores[rows, labels]
    order = np.argsort(-values, kind="stable")
    rows, labels, values = rows[order], labels[order], values[order]
    kept = _greedy(boxes[rows], labels, settings.iou_threshold, settings.max_detections)
    return {
        "boxes": np.asarray(boxes[rows[kept]], np.float32),
        "scores": np.asarray(values[kept], np.float32),
        "labels": labels[kept].astype(np.int64),
    }


def unpad(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Detections:
    """The detections of one image out of a file that suppresses by itself: rows of label -1 are empty."""
    used = labels >= 0
    return {"boxes": boxes[used], "scores": scores[used], "labels": labels[used]}


def iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box (4,) with each of (D, 4): (D,) float32, not a number for two of no area."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    sides = np.maximum(high - low, 0)
    overlap = sides[:, 0] * sides[:, 1]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    area = (box[2] - box[0]) * (box[3] - box[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return overlap / (area + areas - overlap)


def _candidates(scores: np.ndarray, settings: Suppression) -> tuple[np.ndarray, np.ndarray]:
    """(row, class) of the best of each group that are above the threshold."""
    rows, labels = [], []
    if settings.group_by == "class":
        for label in range(settings.first_class, scores.shape[1]):
            best = _best(scores[:, label], settings)
            rows.append(best)
            labels.append(np.full(len(best), label))
    else:
        starts = np.cumsum((0, *settings.levels))
        foreground = scores[:, settings.first_class :]
        for start, end in pairwise(starts):
            best = _best(foreground[start:end].ravel(), settings)
            rows.append(start + best // foreground.shape[1])
            labels.append(settings.first_class + best % foreground.shape[1])
    return np.concatenate(rows), np.concatenate(labels)


def _best(scores: np.ndarray, settings: Suppression) -> np.ndarray:
    """Indices of the highest scores above the threshold, highest first."""
    (above,) = np.nonzero(scores > np.float32(settings.score_threshold))
    order = np.argsort(-scores[above], kind="stable")[: settings.max_candidates]
    return above[order]


def _greedy(boxes: np.ndarray, labels: np.ndarray, iou_threshold: float, max_kept: int) -> list[int]:
    """Indices of the boxes, sorted by certainty, that no more certain one of their class overlaps too much.

    In the order of all classes together, so that it may stop at `max_kept`: a class does not see the others.
    """
    alive = np.ones(len(boxes), bool)
    members = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    kept: list[int] = []
    for index in range(len(boxes)):
        if not alive[index]:
            continue
        kept.append(index)
        if len(kept) == max_kept:
            break
        same = members[labels[index]]
        # In float64, as torchvision compares; two boxes of no area give no number and stay.
        alive[same] &= ~(iou(boxes[index], boxes[same]) > np.float64(iou_threshold))
    return kept


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
