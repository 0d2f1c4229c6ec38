"""How far two sets of detections agree: each box to its counterpart of the same class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cveff.runtime.detections import Detections, iou

MIN_IOU = 0.99
MAX_SCORE_DIFFERENCE = 1e-3
EQUAL_PIXELS = 0.01
"""Boxes whose sides are all this near count as equal."""


@dataclass(frozen=True)
class DetectionAgreement:
    """Counts over all images.

    Attributes:
        matched: detections of the reference that have a counterpart, each its own: the same class, an intersection
            over union of `MIN_IOU` (or sides within `EQUAL_PIXELS`), and a score within `MAX_SCORE_DIFFERENCE`.
        found, expected: detections of the file and of the reference.
        min_iou, max_score_difference: over the matched pairs; 1 and 0 where there are none.
    """

    matched: int
    found: int
    expected: int
    min_iou: float
    max_score_difference: float

    @property
    def share(self) -> float:
        """`matched` of the larger set; 1 where both are empty."""
        return self.matched / max(self.found, self.expected) if self.found or self.expected else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, `share` among them."""
        return {**vars(self), "share": self.share}


def agreement(found: Iterable[Detections], expected: Iterable[Detections]) -> DetectionAgreement:
    """Match detections image by image, the most certain of the reference first, each with its best counterpart.

    Args:
        found, expected: one entry an image, as `cveff.runtime.detections.suppress` returns.
    """
    matched, num_found, num_expected, overlaps, differences = 0, 0, 0, [1.0], [0.0]
    for ours, theirs in zip(found, expected, strict=True):
        num_found, num_expected = num_found + len(ours["scores"]), num_expected + len(theirs["scores"])
        is_free = np.ones(len(ours["scores"]), bool)
        for box, score, label in zip(theirs["boxes"], theirs["scores"], theirs["labels"], strict=True):
            difference = np.abs(ours["scores"] - score)
            fits = is_free & (ours["labels"] == label) & (difference <= MAX_SCORE_DIFFERENCE)
            # What the image's edge leaves of a box may have no area, and then overlaps nothing, not even itself.
            is_equal = np.abs(ours["boxes"] - box).max(1) <= EQUAL_PIXELS
            overlap = np.where(is_equal, 1.0, np.nan_to_num(iou(box, ours["boxes"])))
            overlap = np.where(fits, overlap, -1.0)
            best = int(overlap.argmax()) if len(overlap) else -1
            if best < 0 or overlap[best] < MIN_IOU:
                continue
            is_free[best] = False
            matched += 1
            overlaps.append(float(overlap[best]))
            differences.append(float(difference[best]))
    return DetectionAgreement(matched, num_found, num_expected, min(overlaps), max(differences))
