"""Latency of several predictors in one process, compared in pairs.

Engines keep thread pools that spin for tens of milliseconds after a run, and a machine's speed drifts over seconds.
So candidates run in short blocks, in a freshly shuffled order every round: a block begins when no thread of the
process runs any more, its first calls, which wake the engine's own threads, are discarded, and ratios are taken
within a round, where the drift is the same for both. Medians of those ratios carry order-statistic confidence
intervals, which assume no distribution. Times are in milliseconds a call.
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cveff.errors import CveffError
from cveff.measure.predictor import Predictor
from cveff.measure.threads import rest, usable_cores

Clock = Callable[[], float]

BLOCK_MS = 40.0
"""Time that the timed calls of one block should take together."""
MIN_CALLS = 3
"""Timed calls in a block at least, unless one call alone takes longer than `LONG_CALL_MS`."""
LONG_CALL_MS = 250.0
"""Past this a block is one discarded and one timed call."""
SETTLE_MS = 10.0
"""A block opens with at least this much time of discarded calls: the engine's threads and caches are warm by then."""

FEWEST_ROUNDS = 3
OVERRUN = 3
"""`min_rounds` may take this many times the budget; past it, `FEWEST_ROUNDS` are enough."""


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of a ratio of two candidates' times, measured within the same round.

    Attributes:
        low, high: confidence interval of the median.
        confidence: probability that the interval covers the median (at least 0.95 from 6 rounds on).
        spread: interquartile range divided by the median.
    """

    median: float
    low: float
    high: float
    confidence: float
    spread: float
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Latency:
    """Times of one candidate, in milliseconds a call of `batch` images.

    Attributes:
        median_ms, p10, p90, min_ms: over all timed calls.
        spread: interquartile range of the calls divided by their median.
        throughput: images a second at the median.
        runs: number of timed calls.
        rounds_ms: median of each round's block; round i of every candidate ran within the same moments.
        threads: what the predictor says of itself; None where it says nothing.
        speedup: the reference's time divided by this candidate's: 2 means twice as fast as the reference.
    """

    median_ms: float
    p10: float
    p90: float
    min_ms: float
    spread: float
    throughput: float
    runs: int
    threads: int | None
    batch: int
    rounds_ms: tuple[float, ...] = field(repr=False)
    speedup: Ratio

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "rounds_ms": list(self.rounds_ms), "speedup": self.speedup.to_json()}


@dataclass(frozen=True)
class LatencyResult(Mapping[str, Latency]):
    """What `compare` found: a mapping from candidate to its `Latency`, in the order given.

    Attributes:
        reference: the candidate that every `speedup` is relative to.
        cores: cores this process could use.
        load: the machine's one-minute load average before measuring; well above 0, others were running too.
        seconds: what the comparison took.
    """

    candidates: Mapping[str, Latency]
    reference: str
    batch: int
    rounds: int
    cores: int
    load: float | None
    seconds: float

    def __getitem__(self, name: str) -> Latency:
        return self.candidates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.candidates)

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def fastest(self) -> str:
        """The candidate with the smallest median over rounds."""
        return _by_speed({name: list(item.rounds_ms) for name, item in self.candidates.items()})[0]

    def ratio(self, name: str, other: str) -> Ratio:
        """Time of `other` divided by time of `name`, round by round: above 1, `name` is the faster."""
        return paired_ratio(self[other].rounds_ms, self[name].rounds_ms)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "candidates": {name: item.to_json() for name, item in self.candidates.items()}}


def compare(
    predictors: Mapping[str, Predictor],
    images: np.ndarray,
    *,
    reference: str | None = None,
    budget_seconds: float = 10.0,
    min_rounds: int = 9,
    max_rounds: int = 200,
    precision: float = 0.02,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    rest: Callable[[], None] = rest,
) -> LatencyResult:
    """Time every predictor on the same batch, interleaved.

    Rounds are added until the confidence interval of the ratio between the two fastest is narrower than
    ± `precision`, or the budget is spent. Open every engine with the same number of threads first, inside
    `pinned_threads` where not all cores should count.

    Args:
        predictors: name -> callable on `images`; its attribute `threads` is reported.
        images: uint8 (N, H, W, C).
        reference: the name that speedups are relative to; by default the first.
        budget_seconds: time for rounds past `min_rounds`.
        min_rounds, max_rounds: bounds on the number of rounds. Where `min_rounds` would take more than three
            times the budget, as few as three are run; each `Ratio.confidence` then says what that is worth.
        precision: half width of the interval that is narrow enough, relative to the median.
        seed: of the order within rounds.
        clock: seconds; tests inject their own.
        rest: called before each block of another candidate than the last; returns when no thread is left running,
            or it has waited long enough.

    Raises:
        CveffError: no predictor, an unknown reference, an empty batch, or bounds that contradict each other.
    """
    if not predictors:
        raise CveffError("there is nothing to time; give at least one predictor")
    reference = next(iter(predictors)) if reference is None else reference
    if reference not in predictors:
        raise CveffError(f"reference {reference!r} is not among the candidates {', '.join(predictors)}")
    if not len(images):
        raise CveffError("the batch to time is empty; give at least one image")
    if not 1 <= min_rounds <= max_rounds:
        raise CveffError(
            f"min_rounds is {min_rounds} and max_rounds {max_rounds}; give 1 <= min_rounds <= max_rounds"
        )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    shuffle = random.Random(seed).shuffle
    calls: dict[str, list[float]] = {name: [] for name in predictors}
    rounds: dict[str, list[float]] = {name: [] for name in predictors}
    start = clock()
    with _no_garbage_collection():
        lengths = {name: _block_length(predictor, images, clock) for name, predictor in predictors.items()}
        order, num_rounds, last = list(predictors), 0, list(predictors)[-1]
        while num_rounds < max_rounds:
            shuffle(order)
            for name in order:
                if name != last:
                    rest()
                last = name
                times = _block(predictors[name], images, lengths[name], clock)
                calls[name].extend(times)
                rounds[name].append(float(np.median(times)))
            num_rounds += 1
            seconds = clock() - start
            if num_rounds >= min_rounds and (_narrow(rounds, precision) or seconds >= budget_seconds):
                break
            if num_rounds >= FEWEST_ROUNDS and seconds >= OVERRUN * budget_seconds:
                break
    return LatencyResult(
        candidates={
            name: _summary(
                calls[name],
                rounds[name],
                rounds[reference],
                batch=len(images),
                threads=getattr(predictor, "threads", None),
            )
            for name, predictor in predictors.items()
        },
        reference=reference,
        batch=len(images),
        rounds=num_rounds,
        cores=usable_cores(),
        load=load,
        seconds=clock() - start,
    )


def paired_ratio(times: list[float] | tuple[float, ...], others: list[float] | tuple[float, ...]) -> Ratio:
    """`times[i] / others[i]` over rounds i: median, confidence interval and spread.

    Raises:
        CveffError: there are no rounds, or not equally many.
    """
    if len(times) != len(others) or not times:
        raise CveffError(f"ratios need rounds in pairs, but there are {len(times)} and {len(others)}")
    ratios = np.asarray(times, dtype=float) / np.maximum(np.asarray(others, dtype=float), 1e-12)
    low, high, confidence = median_interval(ratios)
    return Ratio(float(np.median(ratios)), low, high, confidence, _spread(ratios), len(ratios))


def median_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Order-statistic confidence interval of a median: which sorted values bracket it, by the binomial law.

    Args:
        values: (n,) independent draws from any distribution.

    Returns:
        (low, high, coverage). Under 6 values no bracket reaches 0.95: low and high are then the extremes, and
        coverage says what that is worth.
    """
    ordered, count = np.sort(np.asarray(values, dtype=float)), len(values)
    tail, rank = 0.5**count, 0  # P(fewer than rank + 1 of the values lie below the median)
    while rank + 1 < (count + 1) // 2:
        larger = tail + math.comb(count, rank + 1) * 0.5**count
        if larger > (1 - confidence) / 2:
            break
        tail, rank = larger, rank + 1
    return float(ordered[rank]), float(ordered[count - 1 - rank]), 1 - 2 * tail if count > 1 else 0.0


def _block_length(predictor: Predictor, images: np.ndarray, clock: Clock) -> int:
    """Timed calls in a block; also warms the predictor up (first calls allocate and choose kernels)."""
    # Twice: an engine may compile for a batch size when it comes the second time in a row.
    predictor(images)
    predictor(images)
    times: list[float] = []
    while len(times) <= MIN_CALLS and sum(times) < LONG_CALL_MS:
        times.append(_call_ms(predictor, images, clock))
    usual = min(times)
    if usual > LONG_CALL_MS:
        return 1
    return max(MIN_CALLS, min(1000, math.ceil(BLOCK_MS / max(usual, 1e-6))))


def _block(predictor: Predictor, images: np.ndarray, length: int, clock: Clock) -> list[float]:
    settled = _call_ms(predictor, images, clock)
    discarded = 1
    while length > 1 and discarded < length and (discarded < 2 or settled < SETTLE_MS):
        settled += _call_ms(predictor, images, clock)
        discarded += 1
    return [_call_ms(predictor, images, clock) for _ in range(length)]


def _call_ms(predictor: Predictor, images: np.ndarray, clock: Clock) -> float:
    start = clock()
    predictor(images)
    return (clock() - start) * 1000


def _narrow(rounds: Mapping[str, list[float]], precision: float) -> bool:
    """Whether the two fastest can be told apart to within `precision`; with one candidate, its own time."""
    names = _by_speed(rounds)
    if len(names) == 1:
        values = np.asarray(rounds[names[0]])
        low, high, _ = median_interval(values)
        return high - low <= 2 * precision * float(np.median(values))
    ratio = paired_ratio(rounds[names[1]], rounds[names[0]])
    return ratio.high - ratio.low <= 2 * precision * ratio.median


def _by_speed(rounds: Mapping[str, list[float]]) -> list[str]:
    return sorted(rounds, key=lambda name: float(np.median(rounds[name])))


def _summary(
    calls: list[float], rounds: list[float], reference: list[float], *, batch: int, threads: int | None
) -> Latency:
    times = np.asarray(calls)
    median = float(np.median(times))
    return Latency(
        median_ms=median,
        p10=float(np.quantile(times, 0.1)),
        p90=float(np.quantile(times, 0.9)),
        min_ms=float(times.min()),
        spread=_spread(times),
        throughput=1000 * batch / max(median, 1e-9),
        runs=len(calls),
        threads=threads,
        batch=batch,
        rounds_ms=tuple(rounds),
        speedup=paired_ratio(reference, rounds),
    )


def _spread(values: np.ndarray) -> float:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float((high - low) / max(middle, 1e-12))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a call would be charged to whoever was running."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
