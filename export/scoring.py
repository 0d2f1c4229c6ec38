"""Accuracy, agreement and times of many predictors on the same images: one pass over the data."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cveff.data.dataset import Split
from cveff.errors import EngineError
from cveff.measure.accuracy import agreement, predict, top1
from cveff.measure.latency import BLOCK_MS, LONG_CALL_MS, Latency, compare
from cveff.measure.parity import relative_difference
from cveff.measure.predictor import Predictor
from cveff.progress import Progress
from cveff.runtime.input_spec import InputSpec

REFERENCE = "PyTorch"
"""What the original module is called among predictors."""
SCORING_BATCH = 64
"""Fixed, so that a figure measured again is the same figure: kernels may round otherwise at other sizes."""


@dataclass(frozen=True)
class Scores:
    """Answers of several predictors to the same images.

    Attributes:
        logits: (N, classes) float32 by predictor.
        targets: (N,) int64, or None without labels.
        errors: why a predictor has no logits.
    """

    logits: Mapping[str, np.ndarray]
    targets: np.ndarray | None
    errors: Mapping[str, str]

    def accuracy(self, name: str) -> float | None:
        """Top-1 share (0..1); None without labels."""
        return None if self.targets is None else top1(self.logits[name], self.targets)

    def agreement(self, name: str, reference: str) -> float:
        """Share of images with the same top-1."""
        return agreement(self.logits[name], self.logits[reference])

    def relative_difference(self, name: str, reference: str) -> float:
        """`max|a - b| / max|b|` of the logits."""
        return relative_difference(self.logits[name], self.logits[reference])


def score(
    predictors: Mapping[str, Predictor], split: Split, spec: InputSpec, progress: Progress, description: str
) -> Scores:
    """Run every predictor over `split`, decoding each image once. One that fails is left out, with why."""
    logits: dict[str, list[np.ndarray]] = {name: [] for name in predictors}
    errors: dict[str, str] = {}
    batches = split.evaluation_batches(spec, SCORING_BATCH)
    for images, _ in progress.track(batches, description, math.ceil(len(split) / SCORING_BATCH)):
        for name, predictor in predictors.items():
            if name in errors:
                continue
            try:
                logits[name].append(predict(predictor, [(images, None)])[0])
            except EngineError as error:
                errors[name] = f"failed while running: {error}"
    return Scores(
        {name: np.concatenate(parts) for name, parts in logits.items() if name not in errors},
        split.targets,
        errors,
    )


def time_all(
    predictors: Mapping[str, Predictor],
    images: np.ndarray,
    batch_size: int,
    *,
    budget_seconds: float,
    seed: int = 0,
) -> dict[str, Latency]:
    """Interleaved times of all predictors at one batch size.

    Args:
        images: (N, H, W, C) uint8, repeated where there are fewer than `batch_size`.
        budget_seconds: time for rounds once the fewest are done: 9, or as many as fit into five budgets where
            calls are long (never under 3).
    """
    batch = np.ascontiguousarray(np.resize(images, (batch_size, *images.shape[1:])))
    fewest = _fewest_rounds(predictors, batch, 5 * budget_seconds)
    result = compare(predictors, batch, budget_seconds=budget_seconds, min_rounds=fewest, seed=seed)
    return dict(result.candidates)


def _fewest_rounds(predictors: Mapping[str, Predictor], batch: np.ndarray, seconds: float) -> int:
    round_seconds = 0.0
    for predictor in predictors.values():
        predictor(batch)
        start = time.perf_counter()
        predictor(batch)
        call = time.perf_counter() - start
        # A block is about BLOCK_MS of calls, or a few calls where one takes that long.
        round_seconds += max(1.5 * BLOCK_MS / 1000, (2 if 1000 * call > LONG_CALL_MS else 5) * call)
    return max(3, min(9, int(seconds / round_seconds)))


def first_images(split: Split, spec: InputSpec, count: int) -> np.ndarray:
    """The first `count` images, or all if fewer: (count, H, W, C) uint8."""
    batches = split.evaluation_batches(spec, SCORING_BATCH, min(count, len(split)))
    return np.concatenate([images for images, _ in batches])
