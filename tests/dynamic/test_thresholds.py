"""The solver against exhaustive search, and what it says of goals that cannot be met."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cveff.dynamic import thresholds
from cveff.dynamic.thresholds import Choice, Frontier, Goal, solve
from cveff.errors import StepError


def sample(exits: int, count: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Certainties on a coarse grid, with ties; later exits are right more often, certain ones too."""
    random = np.random.default_rng(seed)
    certainties = random.integers(1, 7, (exits, count)) / 8
    chance = 0.3 + 0.5 * certainties + 0.2 * np.arange(exits)[:, None] / exits
    return certainties, random.random((exits, count)) < chance, [1.0 + 2 * index for index in range(exits)]


def by_hand(
    certainties: np.ndarray, correct: np.ndarray, times: list[float], limits: tuple[float, ...]
) -> tuple:
    latency = right = 0.0
    for image in range(correct.shape[1]):
        at = next((k for k, limit in enumerate(limits) if certainties[k, image] >= limit), len(limits))
        latency, right = latency + times[at], right + correct[at, image]
    return latency / correct.shape[1], right / correct.shape[1]


@pytest.mark.parametrize("exits", [2, 3, 4])
def test_the_frontier_is_that_of_exhaustive_search(exits: int) -> None:
    certainties, correct, times = sample(exits)
    frontier = Frontier(certainties, correct, times, times[-1])
    grid = [*np.unique(certainties), np.inf]
    tried = [
        by_hand(certainties, correct, times, limits) for limits in itertools.product(grid, repeat=exits - 1)
    ]
    for goal in (0.4, 0.6, 0.8, 1.0):
        best = max(right for latency, right in tried if latency <= goal * times[-1] + 1e-9)
        found = frontier.choose(Goal(mean_latency=goal))
        assert found.accuracy == pytest.approx(best) and found.mean_latency <= goal + 1e-9
        assert by_hand(certainties, correct, times, found.thresholds) == pytest.approx(
            (found.latency_ms, found.accuracy)
        )
    curve = frontier.curve()
    assert curve[-1].accuracy == pytest.approx(max(right for _, right in tried))
    assert all(a.latency_ms < b.latency_ms and a.accuracy < b.accuracy for a, b in itertools.pairwise(curve))


def test_points_lost_are_undercut_by_their_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    certainties, correct, times = sample(3, 2000, seed=2)
    careful = solve(certainties, correct, times, Goal(accuracy_drop=2.0))
    full = correct[-1].mean()
    assert 100 * (full - careful.accuracy) < 2.0
    monkeypatch.setattr(thresholds, "STANDARD_ERRORS", 0.0)
    bold = solve(certainties, correct, times, Goal(accuracy_drop=2.0))
    assert bold.latency_ms < careful.latency_ms
    assert 100 * (full - bold.accuracy) <= 2.0 + 1e-9


def test_thresholds_hold_on_other_images() -> None:
    """VT6: chosen on one half, the budget is kept on the other, but for that half's own error."""
    certainties, correct, times = sample(3, 20_000, seed=3)
    found = solve(certainties[:, :10_000], correct[:, :10_000], times, Goal(accuracy_drop=1.0))
    other = Frontier(certainties[:, 10_000:], correct[:, 10_000:], times, times[-1])
    lost = 100 * (other.full_accuracy - other.evaluate(found.thresholds).accuracy)
    assert lost < 1.0 + 3 * 100 * np.sqrt(0.3 / 10_000)


def test_without_a_goal_nothing_is_lost() -> None:
    certainties, correct, times = sample(3)
    found = solve(certainties, correct, times, Goal())
    assert found.accuracy >= correct[-1].mean()


def test_an_unreachable_goal_shows_the_best_that_is_reachable() -> None:
    certainties, correct, times = sample(2)
    with pytest.raises(
        StepError, match=r"mean latency of 0.2 .* Best reachable: the fastest 0.333 of the time"
    ):
        solve(certainties, correct, times, Goal(mean_latency=0.2))
    with pytest.raises(StepError, match=r"at 0 points lost.*within the points .*within the time"):
        solve(certainties, correct, times, Goal(mean_latency=0.34, accuracy_drop=0.0))


def test_shares_are_of_what_they_are_said_to_be() -> None:
    certainties, correct, times = sample(2)
    found = solve(certainties, correct, times, Goal(accuracy_drop=100), full_ms=2.0)
    assert found.mean_latency == found.latency_ms / 2 == 0.5
    assert Choice((np.inf,), (0, 1), 1.0, 1.0, 1.0).to_json()["thresholds"] == [None]


def test_bad_input_is_named() -> None:
    certainties, correct, times = sample(2)
    with pytest.raises(StepError, match="do not belong together"):
        solve(certainties, correct[:, :5], times, Goal())
    with pytest.raises(StepError, match="1 exits cannot be solved for"):
        solve(certainties[:1], correct[:1], times[:1], Goal())
    with pytest.raises(StepError, match="mean_latency is 0"):
        Goal(mean_latency=0)
    with pytest.raises(StepError, match="accuracy_drop is -1"):
        Goal(accuracy_drop=-1)
    certainties[0, 0] = np.nan
    with pytest.raises(StepError, match="1 held-out images have certainties that are not finite"):
        solve(certainties, correct, times, Goal())
