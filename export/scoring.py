"""Accuracy, agreement and times of many predictors on the same images: one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cveff.data.dataset import Split
from cveff.errors import EngineError
from cveff.measure.accuracy import agreement, predict, top1
from cveff.measure.latency import Latency, compare
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
        budget_seconds: time for rounds; see `cveff.measure.compare`.
    """
    batch = np.ascontiguousarray(np.resize(images, (batch_size, *images.shape[1:])))
    result = compare(predictors, batch, budget_seconds=budget_seconds, seed=seed)
    return dict(result.candidates)


def first_images(split: Split, spec: InputSpec, count: int) -> np.ndarray:
    """The first `count` images, or all if fewer: (count, H, W, C) uint8."""
    batches = split.evaluation_batches(spec, SCORING_BATCH, min(count, len(split)))
    return np.concatenate([images for images, _ in batches])
