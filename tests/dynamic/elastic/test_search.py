"""Searches keep to the limit, score as many sub-nets as asked, and evolution finds no less than chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cveff.dynamic.elastic_space import Levels
from cveff.dynamic.search import Evolution, Search
from cveff.errors import StepError

SPACE = (3,) * 12 + (2,) * 4


def problem(seed: int) -> tuple[Callable[[Levels], float], Callable[[Levels], bool]]:
    """Each dimension is worth something and costs something, neighbours help each other, and half may be spent."""
    random = np.random.default_rng(seed)
    worth, price = random.random(len(SPACE)), 0.2 + random.random(len(SPACE))
    helped = random.random(len(SPACE) - 1)

    def left(levels: Levels) -> np.ndarray:
        return 1 - np.asarray(levels) / np.asarray(SPACE)

    def score(levels: Levels) -> float:
        shares = left(levels)
        return float(worth @ np.sqrt(shares) + helped @ (shares[1:] * shares[:-1]))

    def fits(levels: Levels) -> bool:
        return float(price @ left(levels)) <= 0.62 * price.sum()

    return score, fits


@pytest.mark.parametrize("seed", range(5))
def test_evolution_beats_chance_at_equal_evaluations_and_keeps_to_the_limit(seed: int) -> None:
    score, fits = problem(seed)
    settings = Evolution(population=30, generations=9)
    evolved, random = (Search(SPACE, score, fits, seed=seed) for _ in range(2))
    best, by_chance = evolved.evolve(settings), random.at_random(settings.evaluations)
    assert len(evolved.scores) == len(random.scores) == settings.evaluations == 300
    assert all(fits(levels) for levels in [*evolved.scores, *random.scores])
    assert score(best) == max(evolved.scores.values())
    # Not merely as good: the margins of these five problems are 0.09 to 0.4 of scores near 8.
    assert score(best) > score(by_chance)


def test_a_search_is_a_function_of_its_seed() -> None:
    score, fits = problem(0)
    found = [list(_evolved(score, fits, seed).scores.items()) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def _evolved(score: Callable[[Levels], float], fits: Callable[[Levels], bool], seed: int) -> Search:
    search = Search(SPACE, score, fits, seed=seed)
    search.evolve(Evolution(population=10, generations=2))
    return search


def test_a_small_space_is_searched_through_once() -> None:
    asked: list[Levels] = []

    def score(levels: Levels) -> float:
        asked.append(levels)
        return -float(sum(levels))

    search = Search((2, 3), score, lambda levels: levels != (0, 0))
    assert sum(search.evolve(Evolution(population=6, generations=3))) == 1
    assert sorted(asked) == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_levels_that_mean_one_sub_net_are_scored_once() -> None:
    search = Search((4,), lambda levels: 0.0, lambda levels: True, identity=lambda levels: levels[0] // 2)
    search.at_random(10)
    assert len(search.scores) == 2


def test_near_the_least_that_is_possible_something_is_found() -> None:
    """Of 3^40 sub-nets only those with one dimension above its least fit: drawing and rejecting would find none."""
    search = Search((3,) * 40, lambda levels: -float(sum(levels)), lambda levels: sum(levels) >= 79)
    assert sum(search.at_random(20)) == 79
    assert all(sum(levels) >= 79 for levels in search.scores) and len(search.scores) == 20


def test_a_limit_that_nothing_keeps_to() -> None:
    with pytest.raises(StepError, match="not even the smallest"):
        Search((2, 2), lambda levels: 0.0, lambda levels: False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 1}, "population is 1"),
        ({"generations": -1}, "generations is -1"),
        ({"mutation": 0.0}, "mutation is 0.0"),
        ({"parents": 1.5}, "parents is 1.5"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float], message: str) -> None:
    with pytest.raises(StepError, match=message):
        Evolution(**settings)  # type: ignore[arg-type]
