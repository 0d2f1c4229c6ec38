"""Rules of operators that move values: executed on the owners themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cveff.compress.operators import BALANCED, operator_name
from cveff.compress.owners import (
    along,
    channel,
    has_owner,
    nobody,
    pairs,
    tight,
    varies,
    varying,
)
from cveff.compress.union_find import NONE

if TYPE_CHECKING:
    from cveff.compress.ownership import Ownership


def move(ownership: Ownership, node: torch.fx.Node) -> Any:
    """Run the operator on owners in place of values."""

    def owners(item: torch.fx.Node) -> Any:
        if item.name in ownership.concrete and not _is_data(node, item):
            return ownership.concrete[item.name]
        if isinstance(ownership.values.get(item.name), tuple):
            return [ownership.canonical(part) for part in ownership.values[item.name]]
        return ownership.value(item)

    name = operator_name(node)
    arguments: Any
    options: Any
    arguments, options = torch.fx.node.map_arg((list(node.args), dict(node.kwargs)), owners)
    if name in ("cat", "concat", "concatenate", "stack"):
        return _concatenate(ownership, arguments, options, name == "stack")
    if any(
        isinstance(item, torch.fx.Node) and item.name not in ownership.concrete for item in _indices(node)
    ):
        return ownership.unknown(node)
    with torch.no_grad():
        # Owners repeat by strides of 0, through which there is no view.
        target: Any = torch.ops.aten.reshape.default if name == "view" else node.target
        result = target(*arguments, **options)
    if name in BALANCED and isinstance(result, (tuple, list)):
        for part in result[1:]:
            if part.shape == result[0].shape:
                ownership.sets.union(*pairs(tight(part), tight(result[0])))
            elif ownership.is_strict and varying(ownership.value(node.args[0])) != varying(tight(part)):  # type: ignore[arg-type]
                ownership.freeze(part, f"{ownership.where(node)} cuts into unequal parts")
    return result


def _concatenate(
    ownership: Ownership, arguments: Sequence[Any], options: dict[str, Any], is_stack: bool
) -> torch.Tensor:
    parts: list[torch.Tensor] = list(arguments[0])
    dim = options.get("dim", arguments[1] if len(arguments) > 1 else 0)
    if is_stack:
        dim %= parts[0].ndim + 1
        parts = [part.unsqueeze(dim) for part in parts]
    dim %= parts[0].ndim
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    for other in range(len(shape)):
        if other != dim and all(part.stride(other) == 0 for part in parts if part.shape[other] > 1):
            parts = [part.narrow(other, 0, 1) for part in parts]
    return torch.cat(parts, dim).expand(shape)


def unfold(ownership: Ownership, node: torch.fx.Node) -> Any:
    """im2col: every channel becomes one entry for each place of the kernel; padding goes with its channel."""
    owners, shape = ownership.value(node.args[0]), ownership.trace.shapes[node.name]  # type: ignore[arg-type]
    if not set(varying(owners)) <= {owners.ndim - 3}:
        return (
            ownership.unknown(node, "mixes positions that differ") if ownership.is_strict else nobody(shape)
        )
    channels = along(owners, -3)
    return channel(np.repeat(channels, shape[-2] // len(channels)), len(shape) - 2, shape)


def fold(ownership: Ownership, node: torch.fx.Node) -> Any:
    """The inverse of im2col: places that overlap are added, all of one channel."""
    owners, shape = ownership.value(node.args[0]), ownership.trace.shapes[node.name]  # type: ignore[arg-type]
    if not has_owner(owners) or (not ownership.is_strict and varying(owners) != [owners.ndim - 2]):
        return nobody(shape)
    if varying(owners) != [owners.ndim - 2]:
        return ownership.unknown(node, "mixes positions that differ")
    table = along(owners, -2).reshape(shape[-3], -1)
    ownership.sets.union(table[:, 1:], np.broadcast_to(table[:, :1], table[:, 1:].shape))
    return channel(ownership.sets.find(table[:, 0]), len(shape) - 3, shape)


def pad(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """Padding along channels belongs to nobody; along other dimensions to the channel it is beside."""
    owners = ownership.value(node.args[0])  # type: ignore[arg-type]
    amounts: list[int] = list(node.args[1])  # type: ignore[arg-type]
    shape = list(owners.shape)
    for index in range(len(amounts) // 2):
        dim = owners.ndim - 1 - index
        before, after = amounts[2 * index], amounts[2 * index + 1]
        if before == after == 0:
            continue
        shape[dim] += before + after
        if varies(owners, dim):
            owners = torch.nn.functional.pad(
                owners.movedim(dim, -1).contiguous(), (before, after), value=NONE
            ).movedim(-1, dim)
        else:
            owners = owners.narrow(dim, 0, 1).expand(shape)
    return owners


def _indices(node: torch.fx.Node) -> list[Any]:
    """The nodes a move takes positions from."""
    if operator_name(node) == "index":
        return [item for item in node.args[1] if item is not None]  # type: ignore[union-attr]
    return [node.args[2]] if operator_name(node) == "index_select" else []


def _is_data(node: torch.fx.Node, item: torch.fx.Node) -> bool:
    """Whether a move takes `item` as the value that is moved, rather than as positions."""
    first = node.args[0]
    return item is first or (isinstance(first, (list, tuple)) and item in first)
