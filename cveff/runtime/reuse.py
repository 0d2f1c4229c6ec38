"""Frames of a video through a staged network: where what the first stage carries on looks like what it carried on for
an earlier frame, the stages behind it are not run, and that frame's answer is taken over.

Deep layers change more slowly than pixels do: the adaptive clock of Shelhamer et al., "Clockwork Convnets for Video
Semantic Segmentation" (ECCV workshops 2016, section 4.3), with the network's stages as its clock's. Pixels that all
change a little, as under noise or another light, defeat `frames.SimilarFrames`; features may stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .errors import CveffError

VALUES = 4096
"""Of an image's features, at most as many are compared: an even sample tells as much."""


class FeatureReuse:
    """The gate, and what it keeps of the last frame that went on to the end. One for each video, from one thread.

    Args:
        threshold: mean absolute difference of features up to which they count as similar, in percent of their mean
            absolute value.

    Attributes:
        frames, reused: counts of the frames seen, and of those that took over an answer. The rest of the frames left
            at the first stage, or went on.

    Raises:
        CveffError: the threshold is negative or no number.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 <= threshold < float("inf"):
            raise CveffError(
                f"threshold of similar features is {threshold!r}; give percent of their magnitude, 0 or more"
            )
        self.threshold = threshold
        self.frames, self.reused = 0, 0
        self._last: np.ndarray | None = None
        self._pending: np.ndarray | None = None
        self._logits: np.ndarray | None = None
        self._stage = 0

    @property
    def share_reused(self) -> float:
        """Of the frames seen; 0 before the first."""
        return self.reused / max(1, self.frames)

    def sources(self, carried: Mapping[str, np.ndarray]) -> np.ndarray:
        """Whose answer each image takes: its own index, that of one before it, or -1: of the call before.

        Args:
            carried: what the first stage carries on, (N, …) each; N images that did not leave there, in order.

        Returns:
            (N,) int64.
        """
        small = signatures(carried)
        found = np.empty(len(small), np.int64)
        last, source = self._last, -1
        for index, features in enumerate(small):
            if last is None or difference(features, last) > self.threshold:
                last, source = features, index
            found[index] = source
        self._pending = last
        return found

    def take_over(self, logits: np.ndarray, left: np.ndarray, whose: np.ndarray) -> None:
        """Give images the answers that they take over, in place, and count.

        Args:
            logits: (N, classes); left: (N,) int64, the stage each left at: of every frame seen.
            whose: (N,) int64, the image whose answer each takes; -1: of the call before.

        Raises:
            CveffError: no frame went on before this call.
        """
        is_before = whose < 0
        if is_before.any():
            if self._logits is None:
                raise CveffError(
                    "no frame went on before this one; give every video a FeatureReuse of its own"
                )
            logits[is_before], left[is_before] = self._logits, self._stage
        taken = np.flatnonzero((whose != np.arange(len(whose))) & ~is_before)
        logits[taken], left[taken] = logits[whose[taken]], left[whose[taken]]
        self.frames += len(whose)
        self.reused += len(taken) + int(is_before.sum())

    def remember(self, logits: np.ndarray, stage: int) -> None:
        """Keep the answer to the last frame that `sources` found to go on: now that it is known, and not before."""
        self._last, self._logits, self._stage = self._pending, logits.copy(), stage


def signatures(carried: Mapping[str, np.ndarray]) -> np.ndarray:
    """What is compared of each image's features, (N, at most `VALUES` or so) float32.

    Args:
        carried: (N, …) arrays by name, such as a stage gives.
    """
    rows = [values.reshape(len(values), math.prod(values.shape[1:])) for _, values in sorted(carried.items())]
    every = max(1, sum(row.shape[1] for row in rows) // VALUES) | 1  # odd: no multiple of the channels
    return np.concatenate([row[:, ::every].astype(np.float32) for row in rows], axis=1)


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of two images' signatures, in percent of the second's mean absolute value."""
    size = float(np.abs(second).mean())
    far = float(np.abs(first - second).mean())
    return 100 * far / size if size else 0.0 if far == 0 else float("inf")
