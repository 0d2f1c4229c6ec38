"""What the loop trains on: which images of the split, in which batches, with which weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from cveff.data.dataset import Split
from cveff.data.share import Share
from cveff.errors import StepError, TrainingError
from cveff.log import NoLog
from cveff.model import Model, load
from cveff.steps import Run
from cveff.train.curriculum import Pool, is_file
from cveff.train.difficulty import BY_PROXY, require_metric
from cveff.train.difficulty_pass import load_difficulty, measure_difficulty
from cveff.train.importance import ImportanceDraw

if TYPE_CHECKING:
    from cveff.train.train import Train


@dataclass(frozen=True)
class Difficulty:
    """How difficulties are measured that a curriculum, a selection or importance sampling ask for.

    Attributes:
        proxy: folder of a saved model or a run that says what is difficult; by default the network itself, trained
            for `proxy_epochs` first.
        proxy_epochs: epochs of that training, by AdamW at 1e-3 without augmentation.
        processes: how many share the pass over the images.
    """

    proxy: Path | None = None
    proxy_epochs: int = 2
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("proxy_epochs", "processes"):
            if getattr(self, name) < 1:
                raise TrainingError(f"difficulty.{name} is {getattr(self, name)!r}; give 1 or more")


class Feed:
    """The training images of a run.

    Difficulties are measured on the whole split, before anything is selected, and kept in `run.folder / "difficulty"`.

    Raises:
        StepError, CheckpointError: a difficulty cannot be had.

    Attributes:
        split: the images that are trained on.
    """

    def __init__(self, model: Model, settings: Train, run: Run, split: Split) -> None:
        self._settings, self._run, self._model, self._whole = settings, run, model, split
        self._proxy: nn.Module | None = None
        targets, kept = split.class_indices(), np.arange(len(split))
        if settings.selection is not None:
            kept = settings.selection.chosen(self._difficulty(settings.selection.metric), targets)
        self.split = split if len(kept) == len(split) else split.subset(kept)
        self._pool: Pool | None = None
        if settings.curriculum is not None:
            values = [self._difficulty(metric)[kept] for metric in settings.curriculum.metrics]
            self._pool = Pool(settings.curriculum, values, targets[kept])
        self._importance: ImportanceDraw | None = None
        if settings.importance is not None:
            self._importance = ImportanceDraw(
                settings.importance, self._difficulty(settings.importance.metric)[kept]
            )
        self._proxy = None

    def batches(self, epoch: int, first: int, share: Callable[[int], float]) -> Iterator[np.ndarray] | None:
        """Indices of each batch of an epoch from the batch `first` on; None: an ordinary shuffled epoch.

        Args:
            share: of the run that is over before a batch of this epoch.
        """
        if self._pool is None and self._importance is None:
            return None
        return self._drawn(epoch, first, share)

    def weights(self, epoch: int, batch: int, share: Share) -> Tensor | None:
        """What the losses of a rank's part of a batch of `batches` are multiplied by, (B,) float32; None: nothing."""
        if self._importance is None:
            return None
        size = min(self._settings.batch_size, len(self.split))
        drawn = self._importance.draw(size, self._run.seed, epoch, batch)
        return self._importance.weights(drawn)[share.positions(size)]

    def _drawn(self, epoch: int, first: int, share: Callable[[int], float]) -> Iterator[np.ndarray]:
        from cveff.data.batches import shuffled

        size, seed = min(self._settings.batch_size, len(self.split)), self._run.seed
        order = shuffled(len(self.split), seed, epoch)
        for batch in range(first, self.split.num_training_batches(size)):
            if self._importance is not None:
                yield self._importance.draw(size, seed, epoch, batch)
                continue
            assert self._pool is not None
            drawn = self._pool.draw(share(batch), size, seed, epoch, batch)
            yield order[batch * size : (batch + 1) * size] if drawn is None else drawn

    def _difficulty(self, metric: str) -> np.ndarray:
        if is_file(metric):
            return load_difficulty(metric, self._whole)
        settings, run = self._settings.difficulty, self._run
        name = require_metric(metric, "metric")
        return measure_difficulty(
            self._whole,
            name,
            self._model.spec.input,
            proxy=self._proxy_module() if name in BY_PROXY else None,
            folder=None if run.folder is None else run.folder / "difficulty",
            processes=settings.processes,
            seed=run.seed,
            progress=run.progress,
        )

    def _proxy_module(self) -> nn.Module:
        if self._proxy is None:
            self._proxy = self._make_proxy()
        return self._proxy

    def _make_proxy(self) -> nn.Module:
        settings, run = self._settings.difficulty, self._run
        if settings.proxy is not None:
            inner = settings.proxy / "model"
            proxy = load(inner if (inner / "model.json").is_file() else settings.proxy)
            if (
                len(proxy.spec.labels) != len(self._model.spec.labels)
                or proxy.spec.input != self._model.spec.input
            ):
                raise StepError(
                    f"difficulty.proxy {settings.proxy} has {len(proxy.spec.labels)} classes and takes "
                    f"{proxy.spec.input.size} images; it must have the model's {len(self._model.spec.labels)} classes "
                    f"and its input of {self._model.spec.input.size}"
                )
            return proxy.module.to(run.device)
        from cveff.train.loop import fit
        from cveff.train.train import Train

        run.progress.message(f"training a proxy for {settings.proxy_epochs} epochs, to say what is difficult")
        training = Train(
            epochs=settings.proxy_epochs,
            batch_size=self._settings.batch_size,
            optimizer="adamw",
            keep="last",
            precision=self._settings.precision,
        )
        folder = None if run.folder is None else run.folder / "proxy"
        proxy = Model(self._model.spec, copy.deepcopy(self._model.module))
        inner_run = replace(run, folder=folder, log=NoLog(), clock=None)
        return fit(proxy, training, inner_run).module.to(run.device)
