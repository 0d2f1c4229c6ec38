"""A budget of wall-clock time in place of epochs: what Cramming (Geiping & Goldstein, arXiv:2212.14034) does.

The learning rate follows the share of the time that is spent, not of the steps that are done, so that it lands on zero
at the deadline however fast the machine is just then.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cveff.errors import TrainingError
from cveff.steps import Clock

EVALUATION_SHARE = 0.05
"""Of the time spent, what validations before the last may take."""

LEAST_STEPS = 10
"""Optimizer steps below which a budget is refused."""

_WARM_UP = 3
_REMEMBERED = 20
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_duration(text: str) -> float:
    """Seconds of "90s", "10m", "1.5h" or "1h30m".

    Raises:
        TrainingError: not such a text, or no time at all.
    """
    match = _DURATION.fullmatch(text.strip())
    parts = match.groups() if match and match[0] else (None, None, None)
    seconds = sum(
        float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True) if part is not None
    )
    if seconds <= 0:
        raise TrainingError(f"train.budget is {text!r}; give a time such as '90s', '10m' or '1h30m'")
    return seconds


def duration(seconds: float) -> str:
    """Seconds as a text that `parse_duration` reads, rounded up to whole seconds."""
    whole = math.ceil(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    parts = [(hours, "h"), (minutes, "m"), (rest, "s")]
    return "".join(f"{count}{unit}" for count, unit in parts if count) or "0s"


@dataclass(frozen=True)
class Reserve:
    """Seconds at the end of a budget that are not for training.

    Attributes:
        evaluation: the last validation.
        saving: writing the state and the kept weights.
        afterwards: what the run does with the model within the budget: scoring, saving, exporting it.
    """

    evaluation: float
    saving: float
    afterwards: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.evaluation + self.saving + self.afterwards


class Budget:
    """The clock of one run.

    Args:
        text: the budget, as `parse_duration` reads it.
        clock: when the work began that the budget pays for; None: now.
        spent: seconds that earlier processes of the same run have used.
        begun: seconds of the budget that had gone when training began; None: it has not.
        now: the time in seconds; other than `time.monotonic` in tests.

    Attributes:
        seconds: the whole budget.
        spent, begun: as given, `begun` set by `begin`.
    """

    def __init__(
        self,
        text: str,
        clock: Clock | None,
        *,
        spent: float = 0.0,
        begun: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = parse_duration(text)
        self.spent, self.begun = spent, begun
        self._now = now
        self._started = now() if clock is None else clock.started
        self._reserve = Reserve(0.0, 0.0)
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._last = now()
        self._steps = 0

    @property
    def elapsed(self) -> float:
        """Seconds of the budget that have gone."""
        return self.spent + self._now() - self._started

    @property
    def end(self) -> float:
        """When training ends, in seconds of the budget."""
        return self.seconds - self._reserve.seconds

    @property
    def reserve(self) -> Reserve:
        """What the end is kept free for."""
        return self._reserve

    def begin(self, reserve: Reserve, step_seconds: float) -> None:
        """Start training, with `reserve` kept free at the end.

        Args:
            step_seconds: a guess, until steps have been timed.

        Raises:
            TrainingError: no time is left for `LEAST_STEPS`; the message says which budget would do.
        """
        elapsed, after = self.elapsed, reserve.saving + reserve.afterwards
        least = elapsed + reserve.seconds + LEAST_STEPS * step_seconds
        if self.begun is None and least > self.seconds:
            raise TrainingError(
                f"train.budget {duration(self.seconds)} is too short: {elapsed:.1f} s went before training, evaluation "
                f"takes {reserve.evaluation:.1f} s, saving and what follows {after:.1f} s; "
                # A quarter more, as times vary from run to run.
                f"the least that would do is {duration(1.25 * least)}"
            )
        self._reserve = reserve
        self._durations.append(step_seconds)
        self.begun = elapsed if self.begun is None else self.begun
        self._last = self._now()

    def adjust(self, reserve: Reserve) -> None:
        """Keep another reserve free, measured again because machines change their speed."""
        self._reserve = reserve

    def resume_steps(self) -> None:
        """Begin timing steps again after something else, such as a validation."""
        self._last = self._now()

    def after_steps(self, count: int = 1) -> None:
        """Note that `count` optimizer steps are done, and how long they took."""
        now = self._now()
        if self._steps == _WARM_UP:
            self._durations.clear()  # the guess, and first steps, which allocate and compile
        self._durations.append((now - self._last) / count)
        self._steps += count
        self._last = now

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, the median of the last ones."""
        return statistics.median(self._durations)

    @property
    def is_measured(self) -> bool:
        """Whether steps beyond the first have been timed."""
        return self._steps > _WARM_UP + _REMEMBERED // 2

    @property
    def share(self) -> float:
        """Of the time for training, what has gone, in [0, 1]."""
        assert self.begun is not None
        time_for_training = self.end - self.begun
        if time_for_training <= 0:
            return 1.0
        return min(1.0, max(0.0, (self.elapsed - self.begun) / time_for_training))

    @property
    def is_over(self) -> bool:
        """Whether another step would end too late."""
        return self.elapsed + self.step_seconds > self.end

    def remaining_steps(self) -> int:
        """Steps that still fit, at the present speed."""
        return max(0, int((self.end - self.elapsed) / self.step_seconds))

    def affords_evaluation(self, spent: float) -> bool:
        """Whether one more validation would end in time and keep their share below `EVALUATION_SHARE`.

        Args:
            spent: seconds that validations have taken so far.
        """
        one, elapsed = self._reserve.evaluation, self.elapsed
        return spent + one <= EVALUATION_SHARE * elapsed and elapsed + one + self.step_seconds <= self.end

    def plan(self, total_steps: int, batch_size: int, images: int) -> str:
        """What the budget is going to buy, as one line."""
        begun, speed = self.begun or 0.0, batch_size / self.step_seconds
        epochs = total_steps * batch_size / images
        return (
            f"budget {duration(self.seconds)}: {begun:.0f} s before training, then {speed:,.0f} images/s for "
            f"{self.end - begun:.0f} s = {total_steps:,} steps = {epochs:.1f} epochs; "
            f"kept free: {self._reserve.evaluation:.1f} s for evaluation, {self._reserve.saving:.1f} s for saving, "
            f"{self._reserve.afterwards:.1f} s for what follows"
        )
