"""Thresholds from held-out images: every combination of quantiles is counted, so the frontier they allow is known.

MSDNet (Huang et al., ICLR 2018, section 4) fixes how many images leave at each exit by one number and reads thresholds
off the images. Here thresholds of all exits vary freely; counts of images by the quantiles they lie in, summed along
the axes, give accuracy and time of every combination at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cveff.errors import StepError

COMBINATIONS = 1_000_000
"""Counted at most; so with one exit 512 quantiles are tried, with two 512, with three 100."""
MAX_QUANTILES, MIN_QUANTILES = 512, 4
STANDARD_ERRORS = 1.0
"""By which an allowed loss of accuracy is undercut, in those of the loss on the held-out images: thresholds are chosen
where they look best, and on other images lose more (the rule of Breiman et al., Classification and Regression Trees,
1984, section 3.4.3)."""
CURVE_POINTS = 60


@dataclass(frozen=True)
class Goal:
    """What thresholds are chosen for; with neither value, to lose nothing.

    Attributes:
        mean_latency: largest mean time of an image at batch 1, as a share of the full network's.
        accuracy_drop: most points of accuracy lost against the full network, one standard error of the loss included.

    With one of them the other is made as good as it can be; with both, time is.

    Raises:
        StepError: at construction, for a value out of range.
    """

    mean_latency: float | None = None
    accuracy_drop: float | None = None

    def __post_init__(self) -> None:
        if self.mean_latency is not None and not self.mean_latency > 0:
            raise StepError(
                f"mean_latency is {self.mean_latency!r}; give a share of the full network's, such as 0.5"
            )
        if self.accuracy_drop is not None and not 0 <= self.accuracy_drop <= 100:
            raise StepError(f"accuracy_drop is {self.accuracy_drop!r}; give points between 0 and 100")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Choice:
    """Thresholds, and what they do on the held-out images.

    Attributes:
        thresholds: of every exit but the last.
        exits: images that leave at each.
        accuracy: top-1 share (0..1).
        latency_ms: mean time of an image.
        mean_latency: the same as a share of the full network's.
    """

    thresholds: tuple[float, ...]
    exits: tuple[int, ...]
    accuracy: float
    latency_ms: float
    mean_latency: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a threshold that nothing reaches is null."""
        thresholds = [value if np.isfinite(value) else None for value in self.thresholds]
        return {**vars(self), "thresholds": thresholds, "exits": list(self.exits)}


class Frontier:
    """Accuracy and time of every combination of thresholds.

    Args:
        certainties: (exits, N) of every exit; the last row is not used.
        correct: (exits, N) bool, whether each exit's answer is right.
        milliseconds: of an image that leaves at each exit.
        full_ms: of the full network, which shares are of.

    Raises:
        StepError: no images, shapes that do not fit, or more exits than can be counted.
    """

    def __init__(
        self,
        certainties: np.ndarray,
        correct: np.ndarray,
        milliseconds: Sequence[float],
        full_ms: float,
    ) -> None:
        if certainties.shape != correct.shape or len(milliseconds) != len(correct) or not correct.size:
            raise StepError(
                f"certainties {certainties.shape}, answers {correct.shape} and {len(milliseconds)} times do not belong "
                "together; there must be one row an exit, and images"
            )
        free = len(correct) - 1
        quantiles = min(MAX_QUANTILES, int(COMBINATIONS ** (1 / max(1, free)) + 1e-9))
        if free < 1 or quantiles < MIN_QUANTILES:
            raise StepError(
                f"{len(correct)} exits cannot be solved for; give 2 to 10, the full network included"
            )
        self._certainties = np.nan_to_num(np.asarray(certainties[:-1], np.float64), nan=-np.inf)
        self._correct, self._full_ms = correct.astype(bool), full_ms
        self._milliseconds = np.asarray(milliseconds, np.float64)
        self._candidates = [_candidates(row, quantiles) for row in self._certainties]
        self._count()

    @property
    def full_accuracy(self) -> float:
        """Top-1 share of the last exit."""
        return float(self._correct[-1].mean())

    def choose(self, goal: Goal) -> Choice:
        """The combination that meets `goal` best.

        Raises:
            StepError: none meets it; the message shows the best that can be reached.
        """
        allowed = 0.0 if goal.mean_latency is None and goal.accuracy_drop is None else goal.accuracy_drop
        is_accurate = np.ones(self._drop.shape, bool) if allowed is None else self._bound <= allowed + 1e-9
        if goal.mean_latency is None:
            return self._best(is_accurate, first=self._latency, second=self._drop)
        is_fast = self._latency <= goal.mean_latency * self._full_ms + 1e-12
        if allowed is None and is_fast.any():
            return self._best(is_fast, first=self._drop, second=self._latency)
        if allowed is not None and (is_fast & is_accurate).any():
            return self._best(is_fast & is_accurate, first=self._latency, second=self._drop)
        raise StepError(self._unreachable(goal, is_fast, is_accurate))

    def curve(self) -> list[Choice]:
        """The combinations that no other beats in both accuracy and time, fastest first; some of many."""
        latency, drop = self._latency.ravel(), self._drop.ravel()
        order = np.lexsort((drop, latency))
        best = np.minimum.accumulate(drop[order])
        kept = order[np.concatenate([[True], best[1:] < best[:-1] - 1e-12])]
        if len(kept) > CURVE_POINTS:
            kept = kept[np.unique(np.linspace(0, len(kept) - 1, CURVE_POINTS).round().astype(int))]
        return [self._at(int(index)) for index in kept]

    def evaluate(self, thresholds: Sequence[float]) -> Choice:
        """What given thresholds do on these images."""
        leaves = np.stack(
            [row >= threshold for row, threshold in zip(self._certainties, thresholds, strict=True)]
            + [np.ones(self._correct.shape[1], bool)]
        )
        at = leaves.argmax(axis=0)
        exits = np.bincount(at, minlength=len(self._correct))
        latency = float((exits * self._milliseconds).sum() / len(at))
        return Choice(
            tuple(float(value) for value in thresholds),
            tuple(int(count) for count in exits),
            float(self._correct[at, np.arange(len(at))].mean()),
            latency,
            latency / self._full_ms,
        )

    def _count(self) -> None:
        """Points lost, their bound and milliseconds for each combination: arrays with an axis an early exit."""
        shape = tuple(len(row) for row in self._candidates)
        cells = [
            np.searchsorted(row, values, side="right") - 1
            for row, values in zip(self._candidates, self._certainties, strict=True)
        ]
        flat = np.ravel_multi_index(tuple(np.maximum(cell, 0) for cell in cells), shape)
        # A certainty that is no number lies below every candidate: such an image never leaves early.
        never = [cell < 0 for cell in cells]
        count = self._correct.shape[1]
        size = int(np.prod(shape))
        latency = np.zeros(shape)
        lost, gained = np.zeros(shape), np.zeros(shape)
        last = self._correct[-1]
        for index, (milliseconds, correct) in enumerate(zip(self._milliseconds, self._correct, strict=True)):
            for total, weights in (
                (latency, np.full(count, milliseconds)),
                (lost, (last & ~correct).astype(float)),
                (gained, (~last & correct).astype(float)),
            ):
                total += _leaving(np.bincount(flat, weights, size).reshape(shape), index)
        if any(mask.any() for mask in never):
            raise StepError(
                f"{int(np.any(never, axis=0).sum())} held-out images have certainties that are not finite; an exit's "
                "logits are nan or infinite: check its weights"
            )
        self._latency = latency / count
        self._drop = 100 * (lost - gained) / count
        deviation = np.sqrt(np.maximum(lost + gained - (lost - gained) ** 2 / count, 0)) / count
        self._bound = self._drop + STANDARD_ERRORS * 100 * deviation

    def _best(self, allowed: np.ndarray, first: np.ndarray, second: np.ndarray) -> Choice:
        indices = np.flatnonzero(allowed)
        order = np.lexsort((second.ravel()[indices], first.ravel()[indices].round(9)))
        return self._at(int(indices[order[0]]))

    def _at(self, index: int) -> Choice:
        cell = np.unravel_index(index, self._latency.shape)
        return self.evaluate([row[place] for row, place in zip(self._candidates, cell, strict=True)])

    def _unreachable(self, goal: Goal, is_fast: np.ndarray, is_accurate: np.ndarray) -> str:
        quickest = self._best(np.ones(is_fast.shape, bool), self._latency, self._drop)
        text = f"no thresholds reach a mean latency of {goal.mean_latency:g} of the full network's"
        if goal.accuracy_drop is not None:
            text += f" at {goal.accuracy_drop:g} points lost, one standard error included"
        reached = [_words("the fastest", quickest, self.full_accuracy)]
        if goal.accuracy_drop is not None:
            kept = self._best(is_accurate, self._latency, self._drop)
            reached.append(_words("within the points", kept, self.full_accuracy))
            if is_fast.any():
                kept = self._best(is_fast, self._drop, self._latency)
                reached.append(_words("within the time", kept, self.full_accuracy))
        return f"{text}. Best reachable: {'; '.join(reached)}. Ask for less, add an earlier exit, or train longer"


def solve(
    certainties: np.ndarray,
    correct: np.ndarray,
    milliseconds: Sequence[float],
    goal: Goal,
    full_ms: float | None = None,
) -> Choice:
    """`Frontier(…).choose(goal)`; `full_ms` is by default the time of an image that leaves last."""
    return Frontier(
        certainties, correct, milliseconds, milliseconds[-1] if full_ms is None else full_ms
    ).choose(goal)


def _candidates(certainties: np.ndarray, count: int) -> np.ndarray:
    """Thresholds to try, ascending: 0, which every certainty reaches, quantiles, and infinity."""
    finite = certainties[np.isfinite(certainties)]
    shares = np.linspace(0, 1, max(2, count - 2))
    inner = np.quantile(finite, shares, method="higher") if len(finite) else np.zeros(0)
    return np.concatenate([[0.0], np.unique(inner[inner > 0]), [np.inf]])


def _leaving(counts: np.ndarray, exit_index: int) -> np.ndarray:
    """For each combination, the sum over images that pass every exit before this one and leave here.

    Args:
        counts: weights by cell; an image in cell c of an axis reaches the thresholds 0 to c of that exit.
    """
    axes = counts.ndim
    later = tuple(range(exit_index + 1, axes))
    found = counts.sum(axis=later, keepdims=True) if later else counts
    for axis in range(min(exit_index, axes)):
        found = np.cumsum(found, axis=axis) - found  # cells below the threshold: those that go on
    if exit_index < axes:
        found = np.flip(np.cumsum(np.flip(found, exit_index), axis=exit_index), exit_index)
    return found


def _words(what: str, choice: Choice, full_accuracy: float) -> str:
    return (
        f"{what} {choice.mean_latency:.3f} of the time at {100 * (full_accuracy - choice.accuracy):.2f} points lost "
        f"(thresholds {', '.join(f'{value:.4g}' for value in choice.thresholds)})"
    )
