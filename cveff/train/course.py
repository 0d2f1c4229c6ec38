"""How far a run is: by the steps of its epochs, or under a budget by the clock (`cveff.train.deadline`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from cveff.progress import Progress
from cveff.train.schedule import learning_rate_factor


class Course(Protocol):
    """The way from a run's first optimizer step to its last.

    Attributes:
        total_steps: of the whole run, or what it looks like now.
    """

    total_steps: int

    def share(self, step: int) -> float:
        """Of the run, in [0, 1], what is over before `step` (from 0)."""
        ...

    def factor(self, schedule: str, step: int) -> float:
        """The learning rate's share of its peak at `step` (from 0), see `learning_rate_factor`."""
        ...

    def after_step(self, step: int) -> bool:
        """Note that step `step` (from 1) is done; whether the run ends with it, within an epoch or not."""
        ...

    def bar(self, step: int) -> Iterator[Any]:
        """A progress bar from `step` on, which moves with each `next`."""
        ...


class Epochs:
    """A number of steps that is known beforehand.

    Args:
        total_steps, warmup_steps: of the schedule.
        consumed: (total_steps + 1,) float64 in [0, 1], what the learning rate follows in place of steps; None: steps.
    """

    def __init__(
        self, total_steps: int, warmup_steps: int, consumed: np.ndarray | None, progress: Progress
    ) -> None:
        self.total_steps = total_steps
        self._warmup_steps, self._consumed, self._progress = warmup_steps, consumed, progress

    def share(self, step: int) -> float:
        """`step` of `total_steps`."""
        return step / self.total_steps

    def factor(self, schedule: str, step: int) -> float:
        """By steps, or by what was consumed before `step`."""
        place = step if self._consumed is None else self.total_steps * float(self._consumed[step])
        return learning_rate_factor(schedule, place, self.total_steps, self._warmup_steps)

    def after_step(self, step: int) -> bool:
        """False: a run of epochs ends after its last validation."""
        return False

    def bar(self, step: int) -> Iterator[int]:
        """The steps that are left."""
        left = range(step, self.total_steps)
        return iter(self._progress.track(left, "training", total=len(left)))
