"""Masks: the right number, the best units, multiples that engines like, and never nothing."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from cveff.compress.groups import Group, Member
from cveff.compress.scopes import choices, keep_best, rounded, select, signature, unit_multiple
from cveff.errors import StepError


def channels(name: str, size: int, repeat_in: int = 1) -> Group:
    """A layer's channels; the consumer sees each `repeat_in` times, as behind a flatten."""
    out = Member(f"{name}.weight", 0, "out", np.arange(size))
    into = Member(f"{name}_next.weight", 1, "in", np.repeat(np.arange(size), repeat_in))
    return Group(name, size, (out, into), "")


def heads(name: str, size: int, width: int) -> Group:
    units = np.repeat(np.arange(size), width)
    out = Member(f"{name}.qkv.weight", 0, "out", np.tile(units, 3))
    return Group(name, size, (out, Member(f"{name}.proj.weight", 1, "in", units)), "")


def ascending(*groups: Group) -> dict[str, np.ndarray]:
    return {group.name: np.arange(1.0, group.size + 1) for group in groups}


def counts(keep: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in keep.items()}


def test_local_keeps_each_groups_best_share() -> None:
    groups = (channels("a", 32), channels("b", 64))
    keep = select(groups, ascending(*groups), "local", 0.5)
    assert counts(keep) == {"a": 16, "b": 32}
    assert keep["a"][16:].all() and not keep["a"][:16].any()


def test_local_takes_a_share_a_group() -> None:
    groups = (channels("a", 32), channels("b", 32))
    assert counts(select(groups, ascending(*groups), "local", {"b": 0.75})) == {"a": 32, "b": 8}


def test_global_ranks_by_score_over_the_groups_mean() -> None:
    """`b` is flat, so half of `a` is below its mean and goes first; scaling a group's scores changes nothing."""
    groups = (channels("a", 32), channels("b", 32))
    scores = {"a": np.arange(1.0, 33), "b": np.full(32, 1.0)}
    keep = select(groups, scores, "global", 0.25, round_to=1)
    assert counts(keep) == {"a": 16, "b": 32}
    scaled = select(groups, {"a": 1000 * scores["a"], "b": scores["b"]}, "global", 0.25, round_to=1)
    assert all(np.array_equal(keep[name], scaled[name]) for name in keep)


def test_a_group_of_zeros_keeps_its_floor() -> None:
    groups = (channels("a", 40), channels("b", 40))
    keep = select(groups, {"a": np.zeros(40), "b": np.ones(40)}, "global", 0.5, round_to=1, min_fraction=0.1)
    assert counts(keep) == {"a": 4, "b": 40}


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, kernel in (("a", 3), ("b", 3), ("c", 1)):
            setattr(self, name, nn.Conv2d(3, 16, kernel))
            setattr(self, f"{name}_next", nn.Conv2d(16, 4, 1))


def test_isomorphic_takes_the_same_share_of_every_topology() -> None:
    """`a` and `b` compete, `c` has another kernel: it loses its own half although its scores spread least."""
    groups = (channels("a", 16), channels("b", 16), channels("c", 16))
    scores = {"a": np.arange(1.0, 17) ** 3, "b": 10 + np.arange(1.0, 17), "c": 100 + np.arange(1.0, 17)}
    module = Twins()
    assert signature(groups[0], module) == signature(groups[1], module) != signature(groups[2], module)
    kept = counts(select(groups, scores, "isomorphic", 0.5, module=module, round_to=1))
    assert kept["c"] == 8 and kept["a"] + kept["b"] == 16 and kept["a"] < kept["b"]


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("amount", [0.0, 0.3, 0.9, 0.999])
def test_counts_are_multiples_or_all_and_never_none(scope: str, amount: float) -> None:
    groups = (channels("a", 5), channels("b", 20), channels("c", 64))
    module = nn.ModuleDict({n: nn.Conv2d(1, 1, 1) for g in "abc" for n in (g, f"{g}_next")})
    keep = select(groups, ascending(*groups), scope, amount, module=module)
    for group in groups:
        count = int(keep[group.name].sum())
        assert count == group.size or (count % 8 == 0 and count >= 8)
        assert amount > 0 or count == group.size


def test_choices() -> None:
    assert choices(channels("a", 20)) == [8, 16, 20]
    assert choices(channels("a", 5)) == [5]
    assert choices(channels("a", 64), min_fraction=0.5) == [32, 40, 48, 56, 64]
    assert rounded(channels("a", 64), 12) == 16  # of two as near, the larger
    assert rounded(channels("a", 64), 11) == 8


def test_units_count_by_what_layers_see() -> None:
    assert unit_multiple(heads("attention", 3, 64), 8) == 1
    assert unit_multiple(heads("attention", 8, 4), 8) == 2
    assert unit_multiple(channels("conv", 16, repeat_in=49), 8) == 8
    assert choices(heads("attention", 3, 64)) == [1, 2, 3]


def test_of_equal_scores_the_first_stay() -> None:
    assert keep_best(np.ones(4), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amount": 1.0}, r"amount 1.0 does not lie in \[0, 1\)"),
        ({"amount": -0.1}, "amount -0.1"),
        ({"amount": float("nan")}, "amount nan"),
        ({"scope": "wide"}, "local, global, isomorphic"),
        ({"scope": "global", "amount": {"a": 0.5}}, "one amount"),
        ({"amount": {"z": 0.5}}, "no groups"),
        ({"scope": "isomorphic"}, "pass module"),
        ({"round_to": 0}, "round_to 0"),
        ({"min_fraction": 2.0}, "min_fraction 2.0"),
        ({"scores": {}}, "group a has no scores"),
        ({"scores": {"a": np.ones(3)}}, r"shape \(3,\)"),
        ({"scores": {"a": np.full(16, np.inf)}}, "not finite"),
    ],
)
def test_bad_settings_say_what_is_wrong(changes: dict, message: str) -> None:
    group = channels("a", 16)
    with pytest.raises(StepError, match=message):
        select(**{"groups": [group], "scores": ascending(group), **changes})
