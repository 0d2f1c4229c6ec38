"""Videos as folders of frames: one that looks like the last computed frame is given that frame's answer.

The gate is the mean absolute difference of small grey thumbnails. It is taken against the last frame that was computed,
not the one before, so slow changes add up until they count.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import CveffError, ImageError

THUMBNAIL = 32
"""Side of the thumbnails, in pixels: fine enough for an object to move in, coarse enough for noise to average out."""
MAX_THRESHOLDS = 64
"""Thresholds tried at most by `calibrate`."""
Difference = Callable[[np.ndarray, np.ndarray], float]


class SimilarFrames:
    """The gate: which frames must be computed. It never looks at answers, so frames can wait to be run together.

    Args:
        threshold: mean absolute difference in grey levels (0..255) up to which frames count as similar; 0 passes over
            frames whose thumbnails are equal only.

    Attributes:
        frames, skipped: counts of the frames seen, and of those that need not be computed.

    Raises:
        CveffError: the threshold is negative or no number.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 <= threshold < float("inf"):
            raise CveffError(f"threshold of similar frames is {threshold!r}; give grey levels, 0 to 255")
        self.threshold = threshold
        self.frames, self.skipped = 0, 0
        self._last: np.ndarray | None = None

    def __call__(self, pixels: np.ndarray) -> bool:
        """Whether the last computed frame's answer serves this one; if not, this is now the last computed.

        Args:
            pixels: (H, W, C) uint8, as the model takes them; C is 1 or 3.
        """
        small = thumbnail(pixels)
        is_similar = self._last is not None and difference(small, self._last) <= self.threshold
        self.frames += 1
        self.skipped += is_similar
        if not is_similar:
            self._last = small
        return is_similar

    @property
    def share_skipped(self) -> float:
        """Of the frames seen; 0 before the first."""
        return self.skipped / max(1, self.frames)

    def reset(self) -> None:
        """Start another video."""
        self.frames, self.skipped = 0, 0
        self._last = None


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 -> grey means of areas, (32, 32) uint8.

    Raises:
        ImageError: another shape or type.
    """
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.dtype != np.uint8:
        raise ImageError(
            f"a frame is {pixels.dtype} {pixels.shape}; give uint8 (H, W, C) with 1 or 3 channels"
        )
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("L")
    return np.asarray(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of two thumbnails, in grey levels."""
    return float(np.abs(first.astype(np.int16) - second).mean())


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what it does on the frames it was chosen on.

    Attributes:
        threshold: for `SimilarFrames`.
        frames: how many it was chosen on.
        skipped: share of them that took over an answer.
        agreement: share of all frames whose answer is the one that computing them gives.
    """

    threshold: float
    frames: int
    skipped: float
    agreement: float


def calibrate(
    thumbnails: Sequence[np.ndarray],
    answers: Sequence[Hashable],
    agreement: float = 0.99,
    difference: Difference = difference,
) -> Calibration:
    """The threshold that passes over most frames while answers stay the same.

    Every candidate is walked through the frames as `SimilarFrames` would; candidates are quantiles of the differences
    of frames 1, 2, 4, … apart.

    Args:
        thumbnails: of the frames, in order, or whatever else `difference` compares.
        answers: what computing each frame gives, such as its best class.
        agreement: least share (0..1) of frames whose answer stays the same.
        difference: of two frames' thumbnails.

    Raises:
        CveffError: no frames, numbers that do not fit, or a share out of range.
    """
    if not 0 <= agreement <= 1:
        raise CveffError(f"agreement is {agreement!r}; give a share of frames, 0 to 1")
    if not len(thumbnails) or len(thumbnails) != len(answers):
        raise CveffError(
            f"{len(thumbnails)} frames and {len(answers)} answers; give frames, and one answer each"
        )
    tried = [
        _walk(thumbnails, answers, threshold, difference) for threshold in _thresholds(thumbnails, difference)
    ]
    allowed = [item for item in tried if item.agreement >= agreement]
    if not allowed:  # frames with equal thumbnails and different answers
        raise CveffError(
            f"at threshold 0 already {tried[0].agreement:.1%} of answers agree, less than {agreement:.1%}: frames that "
            "look alike get different answers. Ask for less, or do not skip frames of this model"
        )
    return max(allowed, key=lambda item: (item.skipped, -item.threshold))


@dataclass(frozen=True)
class Comparison:
    """Every frame computed beside frames skipped, in turns on the same frames.

    Attributes:
        frames: how many.
        skipped: share that took over an answer.
        agreement: share of frames with the same answer both ways.
        every_ms, skipping_ms: mean time of a frame, the gate included; neither includes reading the frame.
    """

    frames: int
    skipped: float
    agreement: float
    every_ms: float
    skipping_ms: float


def compare(
    compute: Callable[[np.ndarray], Hashable], frames: Iterable[np.ndarray], threshold: float
) -> Comparison:
    """Measure what skipping saves, and what it changes.

    Args:
        compute: the answer to one frame (H, W, C), such as its best class; called for each frame, and again for those
            that the gate does not pass over.
        frames: in order, (H, W, C) uint8 each.

    Raises:
        CveffError: no frames, or as `SimilarFrames`.
    """
    gate, last = SimilarFrames(threshold), None

    def skipping(frame: np.ndarray) -> Hashable:
        nonlocal last
        if not gate(frame):
            last = compute(frame)
        return last

    measured = in_turns(compute, skipping, frames)
    return replace(measured, skipped=gate.share_skipped)


def in_turns(
    every: Callable[[np.ndarray], Hashable],
    skipping: Callable[[np.ndarray], Hashable],
    frames: Iterable[np.ndarray],
) -> Comparison:
    """Answer each frame both ways; what was skipped is not known here, and 0.

    Args:
        every: the answer to one frame (H, W, C); it keeps nothing of the frames before.
        skipping: the same, by way of what it keeps.
        frames: in order.

    Raises:
        CveffError: no frames.
    """
    count, same, seconds = 0, 0, {"every": 0.0, "skipping": 0.0}
    ways = {"every": every, "skipping": skipping}
    for index, frame in enumerate(frames):
        if index == 0:
            every(frame)  # engines allocate in their first call
        found: dict[str, Hashable] = {}
        for name in sorted(ways, reverse=index % 2 == 1):  # in turns: the second finds the frame in the cache
            start = time.perf_counter()
            found[name] = ways[name](frame)
            seconds[name] += time.perf_counter() - start
        same += found["skipping"] == found["every"]
        count += 1
    if not count:
        raise CveffError("there are no frames to compare; give one or more")
    every_ms, skipping_ms = (1000 * seconds[name] / count for name in ways)
    return Comparison(count, 0.0, same / count, every_ms, skipping_ms)


def natural(path: Path) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts frames as people number them: frame9 before frame10."""
    parts = re.split(r"([0-9]+)", str(path))
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part)


def _walk(
    thumbnails: Sequence[np.ndarray], answers: Sequence[Hashable], threshold: float, difference: Difference
) -> Calibration:
    last, skipped, same = 0, 0, 0
    for index, small in enumerate(thumbnails):
        if index and difference(small, thumbnails[last]) <= threshold:
            skipped += 1
        else:
            last = index
        same += answers[index] == answers[last]
    count = len(thumbnails)
    return Calibration(threshold, count, skipped / count, same / count)


def _thresholds(thumbnails: Sequence[np.ndarray], difference: Difference) -> list[float]:
    found, lag = [0.0], 1
    while lag < len(thumbnails):
        found += [difference(*pair) for pair in zip(thumbnails, thumbnails[lag:], strict=False)]
        lag *= 2
    values = np.quantile(found, np.linspace(0, 1, MAX_THRESHOLDS), method="lower")
    # Rounded up before they are tried, so that the number people read is the one that was tried.
    return [float(value) for value in np.unique((np.ceil(1000 * values) / 1000).round(3))]
