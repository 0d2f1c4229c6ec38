"""The choice among assemblies, on made-up networks."""

from __future__ import annotations

import itertools

import pytest

from cveff.errors import StepError
from cveff.train.stitching.choose import Parent, assess, choose
from cveff.train.stitching.layout import Layout

WIDE, NARROW = Layout("planes", 8, 4, 4), Layout("planes", 4, 2, 2)
PARENTS = (
    Parent(("a", "b"), (WIDE, WIDE), (100, 200, 300), (1000, 2000, 3000)),
    Parent(("c", "d"), (NARROW, NARROW), (10, 20, 30), (100, 200, 300)),
)
ALIKE = [[[1.0, 0.9], [0.5, 1.0]], [[1.0, 0.4], [0.8, 1.0]]]


def test_an_assembly_costs_its_stages_and_adapters() -> None:
    # Adapters: 8 to 4 channels at 2 × 2 positions, then 4 to 8 at 4 × 4; a batch norm has two vectors.
    found = assess((0, 1, 0), PARENTS, ALIKE)
    assert found.parameters == 100 + 20 + 300 + (32 + 8) + (32 + 16)
    assert found.macs == 1000 + 200 + 3000 + 32 * 4 + 32 * 16
    assert found.similarity == pytest.approx(0.9 * 0.8)
    assert found.joints == (1, 2)


def test_the_most_alike_is_taken_and_within_limits_the_most_alike_that_fits() -> None:
    assert choose(PARENTS, ALIKE).use == (0, 1, 1)  # 0.9
    every = [assess(use, PARENTS, ALIKE) for use in itertools.product((0, 1), repeat=3) if len(set(use)) > 1]
    for limit in sorted(item.parameters for item in every):
        found = choose(PARENTS, ALIKE, max_parameters=limit)
        fitting = [item for item in every if item.parameters <= limit]
        assert found in fitting and found.similarity == max(item.similarity for item in fitting)
    for limit in sorted(item.macs for item in every):
        assert choose(PARENTS, ALIKE, max_macs=limit).macs <= limit


def test_a_limit_that_nothing_meets_says_the_least() -> None:
    every = [assess(use, PARENTS, ALIKE) for use in itertools.product((0, 1), repeat=3) if len(set(use)) > 1]
    least = min(item.parameters for item in every)
    with pytest.raises(StepError, match=rf"no assembly has fewer than {least}; give at least that"):
        choose(PARENTS, ALIKE, max_parameters=least - 1)
    assert choose(PARENTS, ALIKE, max_parameters=least).parameters == least
    least_macs = min(item.macs for item in every)
    with pytest.raises(StepError, match=rf"no assembly has fewer than {least_macs:,}"):
        choose(PARENTS, ALIKE, max_macs=least_macs - 1)
    small = min(item.macs for item in every if item.parameters <= least)
    with pytest.raises(
        StepError, match=rf"no assembly of at most {least} parameters has fewer than {small:,}"
    ):
        choose(PARENTS, ALIKE, max_parameters=least, max_macs=small - 1)


def test_too_many_to_compare_are_refused() -> None:
    many = [Parent(("a",) * 7, (WIDE,) * 7, (1,) * 8, (1,) * 8)] * 8
    with pytest.raises(StepError, match="16,777,216 assemblies"):
        choose(many, [[[1.0] * 8] * 8] * 7)
