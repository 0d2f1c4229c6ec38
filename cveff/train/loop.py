"""The training loop. All randomness is a function of (seed, epoch, step), so a run that was killed and resumed
ends with the weights it would have had."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cveff.data.dataset import Split
from cveff.errors import StepError
from cveff.files import write_json
from cveff.measure.training_memory import MemoryTracker
from cveff.model import Model, save_weights
from cveff.steps import Run
from cveff.train.checkpointing import checkpointed
from cveff.train.compute import Compute, Meter
from cveff.train.course import Course, Epochs
from cveff.train.deadline import Deadline, start_clock
from cveff.train.ema import MovingAverage
from cveff.train.evaluate import evaluate
from cveff.train.feed import Feed
from cveff.train.finite import require_finite
from cveff.train.growth.growing import Growing
from cveff.train.growth.takeover import grow
from cveff.train.importance import weighted
from cveff.train.mup import initialize, parametrization, with_rates
from cveff.train.objective import Constraint, CrossEntropy, Objective
from cveff.train.offload import choose_optimizers
from cveff.train.optimizers import ScheduledOptimizers
from cveff.train.precision import choose_precision
from cveff.train.snapshot import STATE, keep_state, resume
from cveff.train.spread import Spread
from cveff.train.thinning import Thinning

if TYPE_CHECKING:
    from cveff.train.train import Train

SUMMARY = "summary.json"
"""In a run's folder: what training consumed."""


def fit(model: Model, settings: Train, run: Run, objective: Objective | None = None) -> Model:
    """Train `model` on `run.data` by `settings`; see `Train` for their meaning.

    What the model's edits must keep (see `Constraint`) is kept. With `run.folder`, keeps `state.safetensors` (to
    resume from), `best/` and `last/` (saved models) there.

    Args:
        objective: what is minimised; by default cross-entropy with `settings.label_smoothing`.

    Returns:
        The model with the kept weights, on the CPU, in evaluation mode.

    Raises:
        StepError: no data, or fewer classes in the model than in the data.
        TrainingError: the loss or a gradient is not finite, or a budget is too short.
        CheckpointError: `run.resume` and the state in `run.folder` belongs to other settings.
    """
    if run.data is None or run.data.train is None:
        raise StepError("Train needs images with labels; pass data=… with a training split")
    if len(run.data.labels) > len(model.spec.labels):
        raise StepError(
            f"the data has {len(run.data.labels)} classes and the model {len(model.spec.labels)} logits; "
            f"create it with num_classes={len(run.data.labels)}"
        )
    if settings.epochs == 0:
        model.module.eval()
        return model
    if settings.importance is not None and objective is not None:
        raise StepError(
            "train.importance weighs cross-entropy alone; leave it out of steps with another loss"
        )
    # Weights of images come with their targets, and so does label smoothing then.
    objective = objective or CrossEntropy(0.0 if settings.importance else settings.label_smoothing)
    for edit in model.spec.edits:
        if isinstance(edit, Constraint):
            objective = edit.constrained(objective, model.module)
    trainer = Trainer(model, settings, run, objective, run.data.train, run.data.val)
    with ExitStack() as stack:
        stack.callback(trainer.optimizer.close)
        if settings.checkpoint_activations:
            stack.enter_context(checkpointed(trainer.module))
        stack.enter_context(trainer.spread.batch_norms(trainer.module))
        return trainer.train()


class Trainer:
    """The live objects of one run and what is saved of them."""

    def __init__(
        self,
        model: Model,
        settings: Train,
        run: Run,
        objective: Objective,
        train_split: Split,
        val_split: Split,
    ) -> None:
        self.started = time.monotonic()
        self.spread = Spread(settings, objective, run.device)
        run = self.spread.quiet(run)
        self.model, self.settings, self.run, self.objective = model, settings, run, objective
        self.feed = Feed(model, settings, run, train_split)
        self.train_split, self.val_split = self.feed.split, val_split
        self.val_part = self.spread.validation_part(val_split)
        self.batch_images = min(settings.batch_size, len(self.train_split))
        self.spread.require_images(self.batch_images)
        exact = any(getattr(edit, "needs_float32", False) for edit in model.spec.edits)
        wanted = "fp32" if exact and settings.precision == "auto" else settings.precision
        self.precision = choose_precision(wanted, run.device)
        self.extra = objective.extra.to(run.device).train() if objective.extra is not None else nn.Module()
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=self.precision == torch.float16)
        self.batches_per_epoch = self.train_split.num_training_batches(settings.batch_size)
        total_steps = settings.epochs * self.batches_per_epoch
        self.given = model.spec
        self.growth = Growing(model, settings.grow, total_steps, run.seed)
        if settings.grow and objective.extra is not None:
            raise StepError("train.grow changes layers that this objective is fitted to; train without it")
        self.meter = Meter(model.module)
        self.take(self.growth.start)
        self.step = 0
        self.deadline: Deadline | None = None
        self.begun: float | None = None
        self.thinning = Thinning(self.model, settings, run.device)
        warmup_steps = round(settings.warmup_epochs * self.batches_per_epoch)
        self.course: Course = Epochs(
            total_steps, warmup_steps, self.thinning.consumed_share(total_steps), run.progress
        )
        self.best_accuracy, self.best_epoch = -1.0, -1
        self.best_weights: dict[str, torch.Tensor] = {}
        self.finished = False
        self.last_saved = time.monotonic()
        self.epoch_figures: dict[str, float] = {}

    def take(self, model: Model) -> None:
        """Train `model` from here on, with an optimizer and a moving average of its own."""
        settings = self.settings
        self.model = model
        self.module = self.spread.place(model.module)
        self.meter.follow(self.module)
        rule = None
        if settings.mup_base_width is not None:
            rule = parametrization(model, settings.mup_base_width, settings.optimizer, self.run.seed)  # type: ignore[arg-type]
            initialize(self.module, rule)
        self.average = MovingAverage(self.module, settings.ema) if settings.ema else None
        self.spread.shard(self.module, *([self.average.module] if self.average else []))
        self.optimizer = choose_optimizers(self.module, self.extra, settings, self.run.device)
        if rule is not None:
            assert isinstance(self.optimizer, ScheduledOptimizers)
            self.optimizer = with_rates(self.optimizer, self.module, rule)
        self.loss = self.spread.loss(self.objective, self.module, self.extra)

    def mask(self) -> None:
        """Give the weights that growth brought their present share."""
        self.growth.mask(self.module)
        if self.average:
            self.growth.mask(self.average.module)

    def train(self) -> Model:
        if self.run.resume:
            resume(self)
        # The second step is the first that finds the optimizer's state there.
        self.watched_step = min(self.step + 1, self.course.total_steps - 1)
        if not self.finished:
            if self.settings.budget is not None:
                self.course = self.deadline = start_clock(self)
            steps = self.course.bar(self.step)
            for epoch in itertools.count(self.step // self.batches_per_epoch):
                self._train_epoch(epoch, steps)
                if self._validate(epoch):
                    break
            next(steps, None)  # past the last step, where the bar ends
        return self._kept()

    def _train_epoch(self, epoch: int, steps: Any) -> None:
        settings = self.settings
        self.module.train()
        losses: list[torch.Tensor] = []
        started, limit = time.monotonic(), settings.checkpoint_minutes * 60
        for images, targets in self._batches(epoch):
            next(steps, None)
            optimize = self._optimize_watched if self.step == self.watched_step else self._optimize
            losses.append(optimize(images, targets, epoch))
            if len(losses) % 50 == 1:  # seldom, as it waits for the device; first, to name what breaks first
                self._require_finite(losses, images)
            # Never between an epoch's last batch and its validation, which a resumed run would skip.
            is_within_epoch = self.step % self.batches_per_epoch != 0
            is_due = is_within_epoch and time.monotonic() - self.last_saved > limit
            if self.run.folder and self.spread.decided(is_due):
                self._require_finite(losses, images)  # a state of weights that are no numbers would be no use
                keep_state(self)
            if self.course.after_step(self.step):
                break
        self._require_finite(losses, images)
        self.epoch_figures |= {
            "train/loss": self.spread.mean(losses),
            "train/learning_rate": settings.peak_learning_rate
            * self.course.factor(settings.schedule, self.step - 1),
            "train/images_per_second": len(losses) * settings.batch_size / (time.monotonic() - started),
        }

    def _batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The rest of an epoch; begun anew where the network grows, as images may grow with it."""
        settings = self.settings
        while (first := self.step - epoch * self.batches_per_epoch) < self.batches_per_epoch:
            if self.growth.is_due(self.step):
                grow(self)
            for batch in self.train_split.training_batches(
                self.model.spec.input,
                settings.batch_size,
                settings.augmentation,
                num_classes=len(self.model.spec.labels),
                seed=self.run.seed,
                epoch=epoch,
                start=first,
                num_workers=settings.num_workers,
                chosen=self.feed.batches(
                    epoch, first, lambda index: self.course.share(epoch * self.batches_per_epoch + index)
                ),
                share=self.spread.share,
            ):
                yield batch
                if self.growth.is_due(self.step):
                    break

    def _optimize_watched(self, images: torch.Tensor, targets: torch.Tensor, epoch: int) -> torch.Tensor:
        """`_optimize`, and who owns its peak of memory."""
        tracker = MemoryTracker(self.module, self.optimizer.optimizers, self.run.device, [self.extra])
        with tracker:
            loss = self._optimize(images, targets, epoch)
        assert tracker.result is not None
        self.epoch_figures = tracker.result.figures()
        self.run.progress.message(str(tracker.result))
        return loss

    def _optimize(self, images: torch.Tensor, targets: torch.Tensor, epoch: int) -> torch.Tensor:
        """One optimizer step on one batch; the mean loss, still on the device."""
        settings = self.settings
        # Dropout and stochastic depth draw from torch's own generator: seeding it by step makes them resumable.
        key = [self.run.seed, epoch, self.step, *([rank] if (rank := self.spread.share.rank) else [])]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        self.optimizer.set_factor(self.course.factor(settings.schedule, self.step))
        self.growth.before_step(self.step)
        weights = self.feed.weights(epoch, self.step - epoch * self.batches_per_epoch, self.spread.share)
        if weights is not None:
            targets = weighted(targets, weights, len(self.model.spec.labels), settings.label_smoothing)
        images = self.thinning.prepare(images, self.course.share(self.step))
        with self.autocast():
            self.meter.count(images, self.thinning.layer_tokens, self.run.device, self.batch_images)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.run.device)
        for part, answers, context in self.spread.parts(self.loss, images, targets):
            with context:
                with self.autocast():
                    loss = self.loss(part.to(self.run.device, non_blocking=True), answers.to(self.run.device))
                loss = loss / self.batch_images
                # Gradients are averaged over ranks, whose parts of the batch need not be equal.
                self.scaler.scale(loss * self.spread.share.world).backward()
            total += loss.detach()
        if self.run.device.type == "cpu" and not bool(torch.isfinite(total)):
            # Before the update, which makes every weight like it. A GPU would have to be waited for at each step.
            self._require_finite([total], images, self.step + 1)
        if self.scaler.is_enabled():
            for optimizer in self.optimizer.optimizers:
                self.scaler.unscale_(optimizer)
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(
                [*self.module.parameters(), *self.extra.parameters()], settings.clip_norm
            )
        if self.scaler.is_enabled():
            for optimizer in self.optimizer.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.step += 1
        self.objective.after_step(self.module, self.step, max(self.step, self.course.total_steps))
        if self.average:
            self.average.update(self.module, self.step)
            self.objective.after_step(self.average.module, self.step, max(self.step, self.course.total_steps))
        return total

    def _validate(self, epoch: int) -> bool:
        """Validate, log and keep what is due after `epoch`; whether training should stop."""
        settings = self.settings
        budget = self.deadline.budget if self.deadline else None
        is_last = epoch + 1 == settings.epochs if budget is None else budget.is_over
        if budget is not None and is_last:
            self._finish_objective()
        is_due = (epoch + 1) % settings.validate_every == 0
        if budget is not None and is_due:
            is_due = budget.affords_evaluation(self.meter.compute.evaluation_seconds)
        if is_last or is_due:
            module = self.average.module if self.average else self.module
            started = time.monotonic()
            self.spread.validating(module)
            gather = self.spread.gather(len(self.val_split))
            figures = evaluate(module, self.val_part, self.model.spec.input, self.autocast(), gather)
            self.meter.compute.evaluation_seconds += time.monotonic() - started
            self.epoch_figures |= {"val/accuracy": figures["accuracy"], "val/loss": figures["loss"]}
            if self.growth.is_complete(self.step) and figures["accuracy"] > self.best_accuracy:
                self.best_accuracy, self.best_epoch = figures["accuracy"], epoch
                self.best_weights = {
                    name: value.detach().cpu().clone() for name, value in self.spread.weights(module).items()
                }
                if self.run.folder and self.spread.writes:
                    self._save_model(self.best_weights, "best")
            of = f"/{settings.epochs}" if budget is None else f", {100 * budget.share:.0f}% of the budget"
            best = f"  best {100 * self.best_accuracy:.2f}%" if self.best_epoch >= 0 else ""
            self.run.progress.message(
                f"epoch {epoch + 1}{of}  loss {self.epoch_figures['train/loss']:.4f}  "
                f"val accuracy {100 * figures['accuracy']:.2f}%{best}"
            )
        stop = bool(settings.patience) and epoch - self.best_epoch >= settings.patience
        stop = stop and self.growth.is_complete(self.step)
        self.finished = stop or is_last
        consumed = self.compute().figures(len(self.train_split))
        self.epoch_figures |= {f"seen/{name}": value for name, value in consumed.items()}
        self.run.log.write(self.step, {"epoch": epoch + 1, **self.epoch_figures})
        self.epoch_figures = {}
        if self.run.folder:
            if self.finished:
                last = self.spread.weights(self.average.module if self.average else self.module)
                self._save_model(last, "last")
            keep_state(self)
            if self.spread.writes:
                write_json(self.run.folder / SUMMARY, consumed)
        if stop and not is_last:
            self.run.progress.message(
                f"stopped early: no better validation accuracy for {settings.patience} epochs"
            )
        if budget is not None:
            budget.resume_steps()
        return self.finished

    def _finish_objective(self) -> None:
        """What follows the course of training, such as a growing share of zeros, arrives where it was going to."""
        for module in (self.module, *([self.average.module] if self.average else [])):
            self.objective.after_step(module, self.step, self.step)

    def compute(self) -> Compute:
        """What the run has consumed so far."""
        seconds = self.meter.compute.seconds + time.monotonic() - self.started
        seconds = seconds if self.deadline is None else self.deadline.budget.elapsed
        return replace(self.meter.compute, steps=self.step, seconds=seconds)

    def _kept(self) -> Model:
        self.thinning.remove()
        module = self.spread.plain(self.model, self.module)
        if self.settings.keep == "best" and self.best_weights:
            module.load_state_dict(self.best_weights)
        elif self.average or module is not self.module:
            module.load_state_dict(self.spread.weights(self.average.module if self.average else self.module))
        return Model(self.model.spec, module.cpu().eval())

    def _save_model(self, weights: dict[str, torch.Tensor], name: str) -> None:
        assert self.run.folder is not None
        if self.spread.writes:
            save_weights(self.model.spec, weights, self.run.folder / name)

    def autocast(self) -> AbstractContextManager[Any]:
        """What the network computes in."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.run.device.type, self.precision)

    def _require_finite(
        self, losses: list[torch.Tensor], images: torch.Tensor, step: int | None = None
    ) -> None:
        # Loss scaling makes gradients overflow by design, and skips those steps.
        module = nn.Module() if self.scaler.is_enabled() else self.module
        is_alone = self.spread.share.world == 1  # to look for the layer, others would have to take part
        path = self.run.folder / STATE if self.run.folder else None
        require_finite(
            losses,
            module,
            step=self.step if step is None else step,
            learning_rate=self.settings.peak_learning_rate,
            images=images.to(self.run.device) if is_alone else None,
            kept=f"; the last good state is {path}" if path is not None and path.is_file() else "",
        )
