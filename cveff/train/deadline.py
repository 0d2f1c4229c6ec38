"""A budget as the loop meets it: evaluation is timed and kept free for, the plan is said, the length of the run follows
the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from cveff.steps import Clock, Run
from cveff.train.budget import Budget, Reserve
from cveff.train.compute import BACKWARD
from cveff.train.evaluate import evaluate
from cveff.train.schedule import learning_rate_factor
from cveff.train.snapshot import keep_state
from cveff.train.timing import evaluation_seconds

if TYPE_CHECKING:
    from cveff.train.loop import Trainer

_TIMED_AGAIN_AT = 0.8  # share of the time for training
_SYNCHRONIZE_EVERY = 8  # steps on a GPU: doing it at every step would leave it idle in between


class Deadline:
    """The end of one run's training.

    Args:
        budget: its clock.
        run: whose clock, device and progress are used.
        evaluation: times a validation, see `evaluation_seconds`.
        images: of the validation split.
        saving: seconds that writing the run's files takes at the end.
        batch_size, epoch_images: for the plan.
        step: where the run is.
        warmup_share: of the steps, for schedules that have a warm-up.

    Attributes:
        total_steps: that the run will have done in the end, at the present speed.

    Raises:
        TrainingError: the budget is too short.
    """

    def __init__(
        self,
        budget: Budget,
        run: Run,
        evaluation: Callable[[], float],
        images: int,
        *,
        saving: float,
        batch_size: int,
        epoch_images: int,
        step: int,
        warmup_share: float,
    ) -> None:
        self.budget = budget
        self._run, self._evaluation, self._saving = run, evaluation, saving
        self._batch_size, self._epoch_images = batch_size, epoch_images
        self._is_planned = self._is_timed_again = False
        reserve = self._reserve()
        budget.begin(reserve, (1 + BACKWARD) * reserve.evaluation / images * batch_size)
        self.total_steps = step + budget.remaining_steps()
        self._step, self._warmup_share = step, warmup_share

    def after_step(self, step: int) -> bool:
        """Keep time; whether the budget is over."""
        budget, count, self._step = self.budget, 1, step
        if self._run.device.type == "cuda":
            count = _SYNCHRONIZE_EVERY
            if step % count:
                return False
            torch.cuda.synchronize(self._run.device)
        budget.after_steps(count)
        if budget.share >= _TIMED_AGAIN_AT and not self._is_timed_again:
            self._is_timed_again = True
            budget.adjust(self._reserve())
            budget.resume_steps()
        self.total_steps = step + budget.remaining_steps()
        if budget.is_measured and not self._is_planned:
            self._is_planned = True
            self._run.progress.message(budget.plan(self.total_steps, self._batch_size, self._epoch_images))
        return budget.is_over

    def share(self, step: int) -> float:
        """Of the time for training, what has gone; before steps that lie ahead, what will have gone at this speed."""
        share, left = self.budget.share, max(1, self.total_steps - self._step)
        return min(1.0, share + (1 - share) * max(0, step - self._step) / left)

    def factor(self, schedule: str, step: int) -> float:
        """By the share of the time that has gone."""
        total = self.total_steps
        return learning_rate_factor(
            schedule, self.budget.share * total, total, round(self._warmup_share * total)
        )

    def bar(self, step: int) -> Iterator[float]:
        """Percents of the budget: a bar that follows the clock with each `next`."""
        bar, shown = iter(self._run.progress.track(range(100), "training, % of the budget", total=100)), 0
        while True:
            while shown <= int(100 * self.budget.share):
                next(bar, None)
                shown += 1
            yield self.budget.share

    def _reserve(self) -> Reserve:
        """What the end is kept free for, as timed now."""
        clock = self._run.clock
        afterwards = 0.0 if clock is None or clock.afterwards is None else clock.afterwards()
        return Reserve(self._evaluation(), self._saving, afterwards)


def start_clock(trainer: Trainer) -> Deadline:
    """Time what the end of a run's budget is kept free for, and begin.

    Raises:
        TrainingError: the budget is too short.
    """
    settings, run = trainer.settings, trainer.run
    assert settings.budget is not None
    clock = run.clock or Clock(trainer.started)
    budget = Budget(settings.budget, clock, spent=trainer.meter.compute.seconds, begun=trainer.begun)
    started = time.monotonic()
    if run.folder:
        keep_state(trainer)
    module = trainer.average.module if trainer.average else trainer.module
    spec, split = trainer.model.spec.input, trainer.val_split
    return Deadline(
        budget,
        run,
        lambda: evaluation_seconds(lambda part: evaluate(module, part, spec, trainer.autocast()), split),
        len(split),
        # The state, the best and the last weights: at the end all three are written.
        saving=3 * (time.monotonic() - started),
        batch_size=settings.batch_size,
        epoch_images=len(trainer.train_split),
        step=trainer.step,
        warmup_share=settings.warmup_epochs / settings.epochs,
    )
