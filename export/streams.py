"""Mean times over real images: what a network takes that some images leave early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cveff.measure.latency import Latency, compare
from cveff.measure.predictor import Predictor

STREAM_CALLS = 32
"""Calls that one timed stream consists of."""


class Stream:
    """A predictor called on one batch of real images after another; its answer is the last one's.

    Args:
        images: (N, H, W, C) uint8, repeated where there are fewer than `calls * batch`.
    """

    def __init__(
        self, predictor: Predictor, images: np.ndarray, batch: int, calls: int = STREAM_CALLS
    ) -> None:
        self.threads = getattr(predictor, "threads", None)
        self.batch, self.calls = batch, calls
        self._predictor = predictor
        self._batches = [
            np.take(images, range(start, start + batch), axis=0, mode="wrap")
            for start in range(0, calls * batch, batch)
        ]

    def __call__(self, images: np.ndarray | None = None) -> np.ndarray:
        """Run through; `images` is ignored, so that streams of images of different sizes can be compared."""
        for batch in self._batches:
            found = self._predictor(batch)
        return found


def stream_times(
    streams: Mapping[str, Stream], *, seconds: float, rounds: int | None = None, seed: int = 0
) -> dict[str, Latency]:
    """Mean times of a call, all streams in turns; they must have as many calls and batches of one size.

    Args:
        seconds: time for rounds, as `cveff.measure.latency.compare` takes it.
        rounds: their number, in place of `seconds`.
    """
    first = next(iter(streams.values()))
    stand_in = np.zeros((first.batch, 1), np.uint8)
    predictors: dict[str, Predictor] = dict(streams)
    if rounds is None:
        found = compare(predictors, stand_in, budget_seconds=seconds, seed=seed)
    else:
        found = compare(predictors, stand_in, min_rounds=rounds, max_rounds=rounds, seed=seed)
    return {name: _per_call(latency, first.calls) for name, latency in found.items()}


def _per_call(latency: Latency, calls: int) -> Latency:
    return replace(
        latency,
        median_ms=latency.median_ms / calls,
        p10=latency.p10 / calls,
        p90=latency.p90 / calls,
        min_ms=latency.min_ms / calls,
        throughput=latency.throughput * calls,
        rounds_ms=tuple(value / calls for value in latency.rounds_ms),
    )
