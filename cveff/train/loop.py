"""The training loop. All randomness is a function of (seed, epoch, step), so a run that was killed and resumed
ends with the weights it would have had."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cveff.data.dataset import Split
from cveff.errors import CheckpointError, StepError, TrainingError
from cveff.model import Model, load, save
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.machine import describe
from cveff.steps import Run
from cveff.train.ema import MovingAverage
from cveff.train.optimizers import build_optimizer
from cveff.train.schedule import learning_rate_factor
from cveff.train.state import load_state, save_state

if TYPE_CHECKING:
    from cveff.train.train import Train

_BF16_ISA = ("avx512_bf16", "amx_bf16", "bf16")
_EVALUATION_BATCH = 512


def fit(model: Model, settings: Train, run: Run) -> Model:
    """Train `model` on `run.data` by `settings`; see `Train` for their meaning.

    With `run.folder`, keeps `state.safetensors` (to resume from), `best/` and `last/` (saved models) there.

    Returns:
        The model with the kept weights, on the CPU, in evaluation mode.

    Raises:
        StepError: no data, or fewer classes in the model than in the data.
        TrainingError: the loss is not finite.
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
    return _Trainer(model, settings, run, run.data.train, run.data.val).train()


class _Trainer:
    """The live objects of one run and what is saved of them."""

    def __init__(self, model: Model, settings: Train, run: Run, train_split: Split, val_split: Split) -> None:
        self.model, self.settings, self.run = model, settings, run
        self.train_split, self.val_split = train_split, val_split
        self.precision = _precision(settings.precision, run.device)
        self.module: nn.Module = model.module.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(
            self.module,
            settings.optimizer,
            settings.peak_learning_rate,
            settings.weight_decay,
            settings.momentum,
        )
        self.average = MovingAverage(self.module, settings.ema) if settings.ema else None
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=self.precision == torch.float16)
        self.batches_per_epoch = train_split.num_training_batches(settings.batch_size)
        self.total_steps = settings.epochs * self.batches_per_epoch
        self.step = 0
        self.best_accuracy, self.best_epoch = -1.0, -1
        self.best_weights: dict[str, torch.Tensor] = {}
        self.finished = False
        self.last_saved = time.monotonic()

    def train(self) -> Model:
        if self.run.resume:
            self._resume()
        start = self.step
        if not self.finished:
            steps = iter(
                self.run.progress.track(
                    range(start, self.total_steps), "training", total=self.total_steps - start
                )
            )
            for epoch in range(start // self.batches_per_epoch, self.settings.epochs):
                self._train_epoch(epoch, steps)
                if self._validate(epoch):
                    break
            for _ in steps if self.step == self.total_steps else ():
                pass
        return self._kept()

    def _train_epoch(self, epoch: int, steps: Any) -> None:
        settings, run = self.settings, self.run
        first = self.step - epoch * self.batches_per_epoch
        batches = self.train_split.training_batches(
            self.model.spec.input,
            settings.batch_size,
            settings.augmentation,
            num_classes=len(self.model.spec.labels),
            seed=run.seed,
            epoch=epoch,
            start=first,
            num_workers=settings.num_workers,
        )
        self.module.train()
        losses: list[torch.Tensor] = []
        started, limit = time.monotonic(), settings.checkpoint_minutes * 60
        for images, targets in batches:
            next(steps)
            losses.append(self._optimize(images, targets, epoch))
            if len(losses) % 50 == 0:
                self._require_finite(losses[-1])
            # Never between an epoch's last batch and its validation, which a resumed run would skip.
            is_within_epoch = self.step % self.batches_per_epoch != 0
            if self.run.folder and is_within_epoch and time.monotonic() - self.last_saved > limit:
                self._save_state()
        self._require_finite(losses[-1])
        self.epoch_figures = {
            "train/loss": float(torch.stack(losses).mean()),
            "train/learning_rate": settings.peak_learning_rate * self._factor(self.step - 1),
            "train/images_per_second": len(losses) * settings.batch_size / (time.monotonic() - started),
        }

    def _optimize(self, images: torch.Tensor, targets: torch.Tensor, epoch: int) -> torch.Tensor:
        """One optimizer step on one batch; the mean loss, still on the device."""
        settings = self.settings
        # Dropout and stochastic depth draw from torch's own generator: seeding it by step makes them resumable.
        torch.manual_seed(int(np.random.SeedSequence([self.run.seed, epoch, self.step]).generate_state(1)[0]))
        self.optimizer.set_factor(self._factor(self.step))
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.run.device)
        for part, answers in zip(
            images.chunk(settings.accumulation), targets.chunk(settings.accumulation), strict=True
        ):
            with self._autocast():
                logits = self.module(part.to(self.run.device, non_blocking=True))
            loss = F.cross_entropy(
                logits.float(),
                answers.to(self.run.device),
                label_smoothing=settings.label_smoothing,
                reduction="sum",
            ) / len(images)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        if self.scaler.is_enabled():
            for optimizer in self.optimizer.optimizers:
                self.scaler.unscale_(optimizer)
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(self.module.parameters(), settings.clip_norm)
        if self.scaler.is_enabled():
            for optimizer in self.optimizer.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.step += 1
        if self.average:
            self.average.update(self.module, self.step)
        return total

    def _validate(self, epoch: int) -> bool:
        """Validate, log and keep what is due after `epoch`; whether training should stop."""
        settings = self.settings
        is_last = epoch + 1 == settings.epochs
        if is_last or (epoch + 1) % settings.validate_every == 0:
            module = self.average.module if self.average else self.module
            figures = evaluate(
                module, self.val_split, self.model.spec.input, self.run.device, self._autocast()
            )
            self.epoch_figures |= {"val/accuracy": figures["accuracy"], "val/loss": figures["loss"]}
            if figures["accuracy"] > self.best_accuracy:
                self.best_accuracy, self.best_epoch = figures["accuracy"], epoch
                self.best_weights = {
                    name: value.detach().cpu().clone() for name, value in module.state_dict().items()
                }
                if self.run.folder:
                    self._save_model(self.best_weights, "best")
            self.run.progress.message(
                f"epoch {epoch + 1}/{settings.epochs}  loss {self.epoch_figures['train/loss']:.4f}  "
                f"val accuracy {100 * figures['accuracy']:.2f}%  best {100 * self.best_accuracy:.2f}%"
            )
        stop = bool(settings.patience) and epoch - self.best_epoch >= settings.patience
        self.finished = stop or is_last
        self.run.log.write(self.step, {"epoch": epoch + 1, **self.epoch_figures})
        if self.run.folder:
            if self.finished:
                self._save_model((self.average.module if self.average else self.module).state_dict(), "last")
            self._save_state()
        if stop and not is_last:
            self.run.progress.message(
                f"stopped early: no better validation accuracy for {settings.patience} epochs"
            )
        return stop

    def _kept(self) -> Model:
        if self.settings.keep == "best" and self.best_weights:
            self.module.load_state_dict(self.best_weights)
        elif self.average:
            self.module.load_state_dict(self.average.module.state_dict())
        return Model(self.model.spec, self.module.cpu().eval())

    def _save_model(self, weights: dict[str, torch.Tensor], name: str) -> None:
        assert self.run.folder is not None
        saved = Model(self.model.spec, _Weights(weights))
        save(saved, self.run.folder / name)

    def _save_state(self) -> None:
        assert self.run.folder is not None
        save_state(
            self.run.folder / "state.safetensors",
            {
                "settings": self._identity(),
                "step": self.step,
                "finished": self.finished,
                "best_accuracy": self.best_accuracy,
                "best_epoch": self.best_epoch,
                "best_weights": self.best_weights,
                "module": self.module.state_dict(),
                "average": self.average.module.state_dict() if self.average else {},
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        )
        self.last_saved = time.monotonic()

    def _resume(self) -> None:
        path = self.run.folder / "state.safetensors" if self.run.folder else None
        if path is None or not path.is_file():
            return
        state = load_state(path)
        changed = _changed(state.get("settings", {}), self._identity())
        if changed:
            raise CheckpointError(
                f"{path} was written by a run with other settings ({changed}); resume with the same ones, "
                "or train into another folder"
            )
        self.module.load_state_dict(state["module"])
        if self.average:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.finished = state["step"], state["finished"]
        self.best_accuracy, self.best_epoch = state["best_accuracy"], state["best_epoch"]
        self.best_weights = state["best_weights"]
        self.run.log.rewind(self.step)
        self.run.progress.message(f"resumed at step {self.step} of {self.total_steps}")

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a state to fit: the settings, the model, the data and the seed."""
        settings = asdict(self.settings)
        # These change how fast the work goes, not what comes out.
        for name in ("num_workers", "checkpoint_minutes"):
            settings.pop(name)
        return {
            "train": settings,
            "precision": str(self.precision),
            "model": self.model.spec.to_json(),
            "images": len(self.train_split),
            "seed": self.run.seed,
        }

    def _factor(self, step: int) -> float:
        warmup = round(self.settings.warmup_epochs * self.batches_per_epoch)
        return learning_rate_factor(self.settings.schedule, step, self.total_steps, warmup)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.run.device.type, self.precision)

    def _require_finite(self, loss: torch.Tensor) -> None:
        if not math.isfinite(float(loss)):
            raise TrainingError(
                f"the loss became {float(loss)} at step {self.step}; lower train.learning_rate "
                f"(now {self.settings.peak_learning_rate:g}), set train.clip_norm, or use precision fp32"
            )


class _Weights(nn.Module):
    """A state dict that `save` can write as if it were the network's."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._kept = weights

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return self._kept


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    split: Split,
    spec: InputSpec,
    device: torch.device,
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, float]:
    """Top-1 accuracy (0 to 1) and mean cross-entropy of `module` on a split, without augmentation."""
    was_training = module.training
    module.eval()
    mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)
    correct, loss, count = 0, 0.0, 0
    with autocast or nullcontext():
        for images, targets in split.evaluation_batches(spec, _EVALUATION_BATCH):
            batch = torch.tensor(images, device=device).permute(0, 3, 1, 2)
            logits = module(
                ((batch.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
            ).float()
            answers = torch.tensor(targets, device=device)
            correct += int((logits.argmax(1) == answers).sum())
            loss += float(F.cross_entropy(logits, answers, reduction="sum"))
            count += len(answers)
    module.train(was_training)
    return {"accuracy": correct / max(1, count), "loss": loss / max(1, count)}


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if set(describe()["isa"]) & set(_BF16_ISA) else torch.float32
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name == "fp16" and device.type == "cpu":
        raise TrainingError(
            "train.precision is 'fp16' and the device is the CPU, which has none; use 'auto' or 'bf16'"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _changed(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """The first few keys that differ, as "train.epochs: 5 then, 6 now"."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            deeper = _changed(old, new, f"{prefix}{key}.")
            found += [deeper] if deeper else []
        elif (list(old) if isinstance(old, tuple) else old) != (list(new) if isinstance(new, tuple) else new):
            found.append(f"{prefix}{key}: {old!r} then, {new!r} now")
    return "; ".join(found[:3])


def saved_model(folder: Path, name: str = "best") -> Model:
    """The `best` or `last` model of a training folder."""
    return load(folder / name)
