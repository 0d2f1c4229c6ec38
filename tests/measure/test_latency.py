"""Latency on a clock that the tests turn: exact, and never a real time."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cveff.errors import CveffError
from cveff.measure import compare
from cveff.measure.latency import median_interval, paired_ratio

IMAGES = np.zeros((4, 2, 2, 3), np.uint8)


class Clock:
    """Seconds that pass only when a predictor works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, *milliseconds: float, threads: int | None = None) -> Worker:
        return Worker(self, name, milliseconds, threads)


class Worker:
    def __init__(self, clock: Clock, name: str, milliseconds: tuple[float, ...], threads: int | None) -> None:
        self.clock, self.name, self.milliseconds, self.calls = clock, name, milliseconds, 0
        if threads is not None:
            self.threads = threads

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.clock.now += self.milliseconds[self.calls % len(self.milliseconds)] / 1000
        self.clock.log.append(self.name)
        self.calls += 1
        return np.zeros((len(images), 2), np.float32)


def test_known_times_come_back() -> None:
    clock = Clock()
    result = compare(
        {"slow": clock.worker("slow", 8, threads=2), "fast": clock.worker("fast", 2)}, IMAGES, clock=clock
    )
    assert result.fastest == "fast"
    assert result["slow"].median_ms == pytest.approx(8)
    assert result["fast"].median_ms == pytest.approx(2)
    assert result["fast"].speedup.median == pytest.approx(4)
    assert result["slow"].speedup.median == 1.0
    assert result["fast"].throughput == pytest.approx(4 / 0.002)
    assert (result["slow"].threads, result["fast"].threads) == (2, None)
    assert result.reference == "slow"
    assert result.ratio("fast", "slow").median == pytest.approx(4)


def test_the_reference_can_be_any_candidate() -> None:
    clock = Clock()
    workers = {"a": clock.worker("a", 8), "b": clock.worker("b", 2)}
    result = compare(workers, IMAGES, reference="b", clock=clock)
    assert result["a"].speedup.median == pytest.approx(0.25)


def test_a_machine_that_slows_down_does_not_move_the_ratio() -> None:
    clock = Clock()

    class Drifting(Worker):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            started = self.clock.now
            super().__call__(images)
            self.clock.now = started + (self.clock.now - started) * (1 + started)
            return np.zeros((len(images), 2), np.float32)

    workers = {"slow": Drifting(clock, "slow", (4.0,), None), "fast": Drifting(clock, "fast", (2.0,), None)}
    result = compare(workers, IMAGES, clock=clock, min_rounds=30, max_rounds=30)
    speedup = result["fast"].speedup
    assert result["slow"].p90 > 5 * result["slow"].p10  # each alone is all over the place
    assert speedup.low < 2 < speedup.high
    assert 1.7 < speedup.median < 2.3


def test_every_round_times_every_candidate_once_in_changing_order() -> None:
    clock = Clock()
    names = ("a", "b", "c")
    result = compare({name: clock.worker(name, 12) for name in names}, IMAGES, clock=clock, min_rounds=12)
    assert result.rounds == 12
    assert all(len(result[name].rounds_ms) == 12 for name in names)
    blocks = clock.log[3 * 6 :]  # after the calls that warm up and choose the length of a block
    # two discarded and four timed calls a block, three blocks a round
    rounds = [blocks[start : start + 18] for start in range(0, len(blocks), 18)]
    assert all(sorted(set(block)) == list(names) for block in rounds)
    assert len({tuple(dict.fromkeys(block)) for block in rounds}) > 1


def test_the_order_depends_on_the_seed_alone() -> None:
    def order(seed: int) -> list[str]:
        clock = Clock()
        compare({name: clock.worker(name, 10) for name in "abcd"}, IMAGES, clock=clock, seed=seed)
        return clock.log

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_first_calls_of_a_block_do_not_count() -> None:
    clock = Clock()

    class Disturbed(Worker):
        """Slow whenever someone else ran just before."""

        def __call__(self, images: np.ndarray) -> np.ndarray:
            if self.clock.log and self.clock.log[-1] != self.name:
                self.clock.now += 1.0
            return super().__call__(images)

    workers = {name: Disturbed(clock, name, (5.0,), None) for name in ("a", "b")}
    result = compare(workers, IMAGES, clock=clock, budget_seconds=1e9)
    assert result["a"].p90 == pytest.approx(5)
    assert result["b"].speedup.median == pytest.approx(1)


def test_blocks_hold_at_least_three_calls_and_about_forty_milliseconds() -> None:
    for milliseconds, expected in ((100, 3), (4.5, 9), (0.6, 67)):
        clock = Clock()
        result = compare(
            {"a": clock.worker("a", milliseconds)}, IMAGES, clock=clock, min_rounds=2, max_rounds=2
        )
        assert result["a"].runs == 2 * expected


def test_very_long_calls_are_timed_singly() -> None:
    clock = Clock()
    result = compare({"a": clock.worker("a", 2000)}, IMAGES, clock=clock, min_rounds=2, max_rounds=2)
    assert result["a"].runs == 2
    assert len(clock.log) == 2 + 1 + 2 * 2


def test_steady_candidates_stop_at_the_minimum_and_noisy_ones_go_on() -> None:
    clock = Clock()
    steady = compare({"a": clock.worker("a", 10), "b": clock.worker("b", 20)}, IMAGES, clock=clock)
    assert steady.rounds == 9
    clock = Clock()
    noise = [float(value) for value in np.random.default_rng(0).uniform(50, 150, 1009)]
    workers = {"a": clock.worker("a", *noise), "b": clock.worker("b", 100)}
    noisy = compare(workers, IMAGES, clock=clock, budget_seconds=1e3)
    assert noisy.rounds > 9


def test_the_budget_ends_it_but_not_before_the_minimum() -> None:
    clock = Clock()
    noise = [float(value) for value in np.random.default_rng(0).uniform(50, 150, 1009)]
    workers = {"a": clock.worker("a", *noise), "b": clock.worker("b", 100)}
    result = compare(workers, IMAGES, clock=clock, budget_seconds=3.0, min_rounds=4)
    assert result.rounds == 4


def test_a_candidate_too_slow_for_the_budget_cuts_the_minimum_and_says_so() -> None:
    clock = Clock()
    workers = {"a": clock.worker("a", 5000), "b": clock.worker("b", 100)}
    result = compare(workers, IMAGES, clock=clock, budget_seconds=1.0)
    assert result.rounds == 3
    assert result["b"].speedup.confidence == 0.75


def test_result_is_json() -> None:
    clock = Clock()
    result = compare({"a": clock.worker("a", 10)}, IMAGES, clock=clock)
    values = json.loads(json.dumps(result.to_json()))
    assert values["candidates"]["a"]["speedup"]["median"] == 1.0
    assert values["batch"] == 4


@pytest.mark.parametrize("count", [6, 9, 10, 25, 101])
def test_median_interval_covers_as_it_says(count: int) -> None:
    generator = np.random.default_rng(count)
    low, high, coverage = zip(
        *(median_interval(generator.exponential(size=count)) for _ in range(2000)), strict=True
    )
    inside = np.mean((np.array(low) <= np.log(2)) & (np.log(2) <= np.array(high)))
    assert coverage[0] >= 0.95
    assert inside == pytest.approx(coverage[0], abs=0.02)


def test_median_interval_of_few_values_admits_what_it_is_worth() -> None:
    low, high, coverage = median_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high, coverage) == (1.0, 3.0, 0.75)
    assert median_interval(np.array([1.0]))[2] == 0.0


def test_ratio_of_a_thing_to_itself_is_one_exactly() -> None:
    ratio = paired_ratio([1.0, 2.0, 5.0], [1.0, 2.0, 5.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.spread) == (1.0, 1.0, 1.0, 0.0)


def test_bad_arguments() -> None:
    clock = Clock()
    worker = clock.worker("a", 1)
    with pytest.raises(CveffError, match="nothing to time"):
        compare({}, IMAGES)
    with pytest.raises(CveffError, match="'b' is not among"):
        compare({"a": worker}, IMAGES, reference="b")
    with pytest.raises(CveffError, match="empty"):
        compare({"a": worker}, IMAGES[:0])
    with pytest.raises(CveffError, match="min_rounds is 5"):
        compare({"a": worker}, IMAGES, min_rounds=5, max_rounds=4)
    with pytest.raises(CveffError, match="in pairs"):
        paired_ratio([1.0], [1.0, 2.0])
    assert worker.calls == 0


def test_threads_come_to_rest_before_another_candidate_runs() -> None:
    clock = Clock()
    workers = {"a": clock.worker("a", 4), "b": clock.worker("b", 4)}
    compare(workers, IMAGES, clock=clock, rest=lambda: clock.log.append("rest"))
    blocks = [name for name, before in zip(clock.log, [None, *clock.log], strict=False) if name != before]
    rounds = blocks[blocks.index("rest") - 1 :]
    assert all(rounds[index] == "rest" for index in range(1, len(rounds), 2))


def test_a_candidate_alone_never_waits() -> None:
    clock = Clock()
    compare({"a": clock.worker("a", 4)}, IMAGES, clock=clock, rest=lambda: clock.log.append("rest"))
    assert "rest" not in clock.log
