"""From scores to masks: which groups compete with which, and how many units an engine likes a layer to have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from torch import nn

from cveff.compress.units import owner
from cveff.errors import StepError

if TYPE_CHECKING:
    from cveff.compress.groups import Group

Scope = Literal["local", "global", "isomorphic"]


def select(
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    scope: Scope = "local",
    amount: float | Mapping[str, float] = 0.5,
    *,
    module: nn.Module | None = None,
    round_to: int = 8,
    min_fraction: float = 0.1,
) -> dict[str, np.ndarray]:
    """Choose the units to keep.

    Args:
        scores: (size,) of each group, larger meaning more needed.
        scope: "local": each group loses its own share. "global": all units are ranked together, by score over the
            group's mean score. "isomorphic": ranked together within classes of groups with the same topology, each
            class losing the same share (Fang et al., "Isomorphic Pruning", ECCV 2024), because scores of unlike
            structures do not compare.
        amount: share of the units to remove, 0 ≤ amount < 1; with "local" also one a group, by name (a group
            that is not named keeps everything).
        module: the network; "isomorphic" reads its layers' types and kernels.
        round_to: channels of a layer are kept in multiples of this, the nearest one; a group with no more
            channels stays whole. A head of 64 channels is such a multiple by itself, so heads are counted singly.
        min_fraction: a group keeps at least this share, however it ranks.

    Returns:
        group name -> bool (size,), True for units that stay; at least one always does.

    Raises:
        StepError: an amount outside [0, 1), unknown groups, scores that are missing or not finite, "isomorphic"
            without `module`, or one amount a group with a scope that ranks groups together.
    """
    _check(groups, scores, scope, amount, round_to, min_fraction)
    if scope == "isomorphic" and module is None:
        raise StepError("scope 'isomorphic' compares layers; pass module=…")
    wanted: dict[str, float] = {}
    if isinstance(amount, Mapping) or scope == "local":
        for group in groups:
            share = amount.get(group.name, 0.0) if isinstance(amount, Mapping) else amount
            wanted[group.name] = group.size * (1 - share)
    else:
        for rivals in _classes(groups, module if scope == "isomorphic" else None):
            wanted |= _ranked_together(rivals, scores, amount)
    return {
        group.name: keep_best(
            scores[group.name],
            rounded(group, wanted[group.name], round_to=round_to, min_fraction=min_fraction),
        )
        for group in groups
    }


def keep_best(scores: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest scores, bool (size,); of equal ones, the first."""
    keep = np.zeros(len(scores), bool)
    keep[np.argsort(-scores, kind="stable")[:count]] = True
    return keep


def normalized(scores: np.ndarray) -> np.ndarray:
    """`scores` over their mean, (size,), so that groups compare; zeros stay zeros."""
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def unit_multiple(group: Group, round_to: int) -> int:
    """Units to count in, so that layers' channels are multiples of `round_to`.

    A unit that is 64 channels of every layer (a head) is one by itself; a unit that is one channel anywhere counts
    as one.
    """
    widths = [
        int(np.gcd.reduce(np.bincount(member.units[member.units >= 0], minlength=group.size)))
        for member in group.members
        if member.role != "scale"
    ]
    return round_to // math.gcd(round_to, math.gcd(*widths)) if widths else round_to


def choices(group: Group, *, round_to: int = 8, min_fraction: float = 0.1) -> list[int]:
    """Numbers of units the group may be left with, ascending; the last is all of them."""
    multiple = unit_multiple(group, round_to)
    least = max(1, math.ceil(min_fraction * group.size - 1e-9))
    return [*(count for count in range(multiple, group.size, multiple) if count >= least), group.size]


def rounded(group: Group, count: float, *, round_to: int = 8, min_fraction: float = 0.1) -> int:
    """The allowed number of units (see `choices`) nearest to `count`; of two as near, the larger."""
    allowed = choices(group, round_to=round_to, min_fraction=min_fraction)
    return min(reversed(allowed), key=lambda number: abs(number - count))


def signature(group: Group, module: nn.Module) -> tuple[tuple[str, str, str, int, tuple[int, ...]], ...]:
    """Topology of a group: (layer type, parameter's name, role, dimension, kernel) of its members, in order.

    Widths are left out: the same structure at another stage is of the same class.
    """
    entries = []
    for member in group.members:
        _, layer = owner(module, member)
        kernel = tuple(getattr(layer, "kernel_size", ()))
        leaf = member.parameter.rpartition(".")[2]
        entries.append((type(layer).__name__, leaf, member.role, member.dim, kernel))
    return tuple(entries)


def _classes(groups: Sequence[Group], module: nn.Module | None) -> list[list[Group]]:
    """Groups that are ranked together: all, or those of one signature where `module` is given."""
    classes: dict[object, list[Group]] = {}
    for group in groups:
        classes.setdefault(signature(group, module) if module is not None else None, []).append(group)
    return list(classes.values())


def _ranked_together(
    groups: Sequence[Group], scores: Mapping[str, np.ndarray], amount: float
) -> dict[str, float]:
    """How many units of each group are among the best of all."""
    values = np.concatenate([normalized(scores[group.name]) for group in groups])
    home = np.repeat(np.arange(len(groups)), [group.size for group in groups])
    kept = keep_best(values, round(len(values) * (1 - amount)))
    counts = np.bincount(home[kept], minlength=len(groups))
    return {group.name: float(count) for group, count in zip(groups, counts, strict=True)}


def _check(
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    scope: str,
    amount: float | Mapping[str, float],
    round_to: int,
    min_fraction: float,
) -> None:
    if scope not in get_args(Scope):
        raise StepError(f"scope {scope!r} is unknown; known: {', '.join(get_args(Scope))}")
    if round_to < 1:
        raise StepError(f"round_to {round_to} is not a positive number of channels; 8 suits most engines")
    if not 0 <= min_fraction <= 1:
        raise StepError(f"min_fraction {min_fraction} does not lie between 0 and 1")
    if isinstance(amount, Mapping):
        if scope != "local":
            raise StepError(
                f"scope {scope!r} shares one amount among groups; give a number, or scope='local'"
            )
        unknown = sorted(amount.keys() - {group.name for group in groups})
        if unknown:
            raise StepError(f"amounts are given for {unknown}, which are no groups of this network")
    for share in amount.values() if isinstance(amount, Mapping) else (amount,):
        if not 0 <= share < 1:
            raise StepError(f"amount {share} does not lie in [0, 1); it is the share of units to remove")
    for group in groups:
        if group.name not in scores:
            raise StepError(f"group {group.name} has no scores; score all groups")
        values = scores[group.name]
        if values.shape != (group.size,) or not np.isfinite(values).all():
            raise StepError(
                f"scores of group {group.name} have shape {values.shape} or are not finite; "
                f"give ({group.size},) finite numbers"
            )
