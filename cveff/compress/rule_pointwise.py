"""Rules of operators that work element by element: what they combine lives and dies together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from cveff.compress.operators import operator_name
from cveff.compress.owners import (
    compact,
    has_owner,
    nobody,
    pairs,
    tight,
    varying,
)
from cveff.compress.union_find import NONE

if TYPE_CHECKING:
    from cveff.compress.ownership import Ownership


def pointwise(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """An operator on one value, or on several element by element."""
    shape = ownership.trace.shapes[node.name]
    values = [ownership.value(_unexpanded(ownership, item)) for item in node.all_input_nodes]
    return combine(ownership, values, shape, ownership.where(node))


def _unexpanded(ownership: Ownership, item: torch.fx.Node) -> torch.fx.Node:
    """Where `item` repeats a value that belongs to nobody (a norm over channels), that value: it broadcasts as well."""
    if operator_name(item) in ("expand", "expand_as") and not has_owner(ownership.value(item)):
        source = item.args[0]
        if isinstance(source, torch.fx.Node) and source.name not in ownership.concrete:
            return source
    return item


def combine(
    ownership: Ownership, values: Sequence[torch.Tensor], shape: tuple[int, ...], where: str
) -> torch.Tensor:
    """Owners of values that are combined element by element.

    Args:
        values: owners, of shapes that broadcast to `shape`.
        where: the operator and its module, for reasons.
    """
    owned = [tight(value.expand(shape)) for value in values if has_owner(value)]
    if not owned:
        return nobody(shape)
    result = owned[0]
    for value in owned[1:]:
        result = _combine_two(ownership, result, value, where)
    # A constant that differs from channel to channel cannot follow when channels go.
    changing = varying(result)
    for value in values:
        if (
            ownership.is_strict
            and not has_owner(value)
            and any(_size(value, dim, len(shape)) > 1 for dim in changing)
        ):
            ownership.freeze(result, f"{where} combines it with a constant")
    return result


def _combine_two(ownership: Ownership, first: torch.Tensor, second: torch.Tensor, where: str) -> torch.Tensor:
    changing = set(varying(first)), set(varying(second))
    only_first, only_second = changing[0] - changing[1], changing[1] - changing[0]
    if only_first and only_second and is_made(ownership, first) != is_made(ownership, second):
        return first if is_made(ownership, first) else second  # a table that all channels share
    # Entries of a table (relative positions) go with the one channel they are added to.
    table = (only_first and not is_made(ownership, first)) or (only_second and not is_made(ownership, second))
    if (only_first or only_second) and not table and not (changing[0] & changing[1] and ownership.is_strict):
        if not ownership.is_strict:
            return first if len(changing[0]) >= len(changing[1]) else second
        # One value meets several channels of the other: it has to stay while they may go.
        if only_first and not only_second:
            ownership.freeze(second, f"{where} spreads it over channels")
            return first
        if only_second and not only_first:
            ownership.freeze(first, f"{where} spreads it over channels")
            return second
    a, b = pairs(first, second)
    ownership.sets.union(a, b)
    alone = (a == NONE) ^ (b == NONE)
    if ownership.is_strict and alone.any():
        ownership.sets.freeze(np.concatenate([a[alone], b[alone]]), f"{where} combines it with a constant")
    return ownership.canonical(torch.maximum(first, second))


def is_made(ownership: Ownership, owners: torch.Tensor) -> bool:
    """Whether a weight makes any of a value's channels."""
    return bool(ownership.sets.is_made(compact(owners).reshape(-1).numpy()).any())


def glu(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """A half that gates the other: unit i of both goes together."""
    owners = ownership.value(node.args[0])  # type: ignore[arg-type]
    dim = int(node.args[1]) if len(node.args) > 1 else -1  # type: ignore[arg-type]
    first, second = owners.chunk(2, dim)
    ownership.sets.union(*pairs(tight(first), tight(second)))
    return first


def create(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """A constant in the shape of another value."""
    return nobody(ownership.trace.shapes[node.name])


def _size(owners: torch.Tensor, dim: int, ndim: int) -> int:
    """The size, before broadcasting to `ndim` dimensions, of a value along `dim`."""
    own = dim - (ndim - owners.ndim)
    return owners.shape[own] if own >= 0 else 1
