"""Do images leave where they did when thresholds were set? A binomial test on windows of the stream.

Images that a network was not made for leave earlier or later than calibrated: noise, another camera, another set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOWS = (256, 1024, 4096)
"""Images a test looks at: short windows see large changes soon, long ones see small changes."""
FALSE_ALARMS = 0.01
"""Chance that images like those calibrated with raise an alarm within `HORIZON` of them."""
HORIZON = 10_000


@dataclass(frozen=True)
class Alarm:
    """Images stopped leaving as calibrated.

    Attributes:
        stage: index; the share is of images that left there or before.
        found: that share in the window.
        low, high: the calibrated range.
        window: images in the window.
        position: images seen when it ended.
        probability: of a share as far outside the range, or farther, were the range still right.
    """

    stage: int
    found: float
    low: float
    high: float
    window: int
    position: int
    probability: float

    def __str__(self) -> str:
        return (
            f"of the {self.window} images up to number {self.position}, {100 * self.found:.1f}% left by stage "
            f"{self.stage + 1}, where {100 * self.low:.1f}% to {100 * self.high:.1f}% were calibrated; "
            f"these images are "
            "unlike those that thresholds were set on, so accuracy and times may be others"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


class DriftMonitor:
    """Counts where images leave, and tests the counts whenever a window is full.

    The true share of images that leave by a stage lies within the calibrated range (Clopper & Pearson, Biometrika 26,
    1934) but for a chance of half of `false_alarms`. A window raises an alarm if its count is so far outside the range
    that the binomial law with the nearer end of the range makes it rarer than the other half, divided by the number of
    tests within `horizon` images (Bonferroni). So images that are independent draws of what was calibrated with raise
    an alarm within `horizon` of them with a chance of `false_alarms` at most.

    Args:
        exits: images that left at each stage, of those calibrated with.
        false_alarms, horizon: see above.
        windows: lengths.

    Attributes:
        ranges: (low, high) of the share that left by each stage but the last.
        alarms: in the order they were raised.
        images: seen so far.
    """

    def __init__(
        self,
        exits: Sequence[int],
        *,
        false_alarms: float = FALSE_ALARMS,
        horizon: int = HORIZON,
        windows: Sequence[int] = WINDOWS,
    ) -> None:
        total = sum(exits)
        by_stage = np.cumsum(exits)[:-1]
        num_tests = max(1, sum(max(1, horizon // length) for length in windows) * len(by_stage) * 2)
        self._level = false_alarms / 2 / num_tests
        outside = false_alarms / 2 / max(1, len(by_stage))
        self.ranges = [interval(int(count), total, outside) for count in by_stage]
        self.alarms: list[Alarm] = []
        self.images = 0
        self._windows = {length: np.zeros(length, np.int64) for length in windows}

    def update(self, stages: np.ndarray) -> list[Alarm]:
        """Count a batch; returns the alarms that it raised.

        Args:
            stages: (N,) int, the stage each image left at, in the order of the stream.
        """
        raised: list[Alarm] = []
        for length, seen in self._windows.items():
            done = 0
            while done < len(stages):
                filled = (self.images + done) % length
                part = stages[done : done + length - filled]
                seen[filled : filled + len(part)] = part
                done += len(part)
                if filled + len(part) == length:
                    raised += self._test(seen, self.images + done)
        self.images += len(stages)
        self.alarms += raised
        return raised

    def _test(self, seen: np.ndarray, position: int) -> list[Alarm]:
        raised = []
        for stage, (low, high) in enumerate(self.ranges):
            count, length = int((seen <= stage).sum()), len(seen)
            if count > high * length:
                probability = at_least(count, length, high)
            elif count < low * length:
                probability = at_least(length - count, length, 1 - low)
            else:
                continue
            if probability <= self._level:
                raised.append(Alarm(stage, count / length, low, high, length, position, probability))
        return raised


def interval(count: int, total: int, outside: float) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share: `count` of `total` seen, wrong with a chance of `outside` at most."""
    if total == 0:
        return 0.0, 1.0
    low = 0.0 if count == 0 else _solve(count, total, outside / 2)
    high = 1.0 if count == total else 1 - _solve(total - count, total, outside / 2)
    return low, high


def at_least(count: int, total: int, share: float) -> float:
    """P(X >= count) of a binomial X of `total` draws, each with probability `share`."""
    if count <= 0:
        return 1.0
    if share <= 0:
        return 0.0
    if share >= 1:
        return 1.0
    hits = np.arange(count, total + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    logarithms = factorials[total] - factorials[hits] - factorials[total - hits]
    logarithms += hits * np.log(share) + (total - hits) * np.log1p(-share)
    with np.errstate(under="ignore"):
        return float(min(1.0, np.exp(logarithms).sum()))


def _solve(count: int, total: int, chance: float) -> float:
    """The share with which `count` or more of `total` have this chance; the chance grows with the share."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if at_least(count, total, middle) < chance else (low, middle)
    return low
