"""Rules of operators that take statistics: pools, means, softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cveff.compress.operators import SUMS, operator_name
from cveff.compress.owners import (
    columns,
    nobody,
    pairs,
    tight,
    varies,
    varying,
)
from cveff.compress.rule_pointwise import is_made

if TYPE_CHECKING:
    from cveff.compress.ownership import Ownership


def softmax(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """Softmax; over the channels that stay where it runs along channels."""
    owners = ownership.value(node.args[0])  # type: ignore[arg-type]
    if varies(owners, int(node.args[1])):  # type: ignore[arg-type]
        ownership.normalizers.add(node.name)
    return owners


def spatial(ownership: Ownership, node: torch.fx.Node) -> Any:
    """Pools and resizes over the last dimensions, which may not be channels."""
    owners = ownership.value(node.args[0])  # type: ignore[arg-type]
    shape = ownership.trace.shapes.get(node.name)
    if shape is None:  # the values and where they were
        outputs = [tuple(int(size) for size in item.shape) for item in node.meta["val"]]
        return tuple(_pooled(ownership, node, owners, size) for size in outputs)
    return _pooled(ownership, node, owners, shape)


def _pooled(
    ownership: Ownership, node: torch.fx.Node, owners: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    name = operator_name(node)
    spatial = 1 if "1d" in name else 3 if "3d" in name else 2
    if any(varies(owners, -1 - index) for index in range(spatial)):
        if not ownership.is_strict:
            return nobody(shape)
        if is_made(ownership, owners):
            result = ownership.unknown(node, "slides over channels")
            return result if isinstance(result, torch.Tensor) else nobody(shape)
        # A table of positions that is resized: all positions of an entry are one.
        for index in range(spatial):
            table = columns(owners, owners.ndim - 1 - index)
            ownership.sets.union(table[:, 1:], np.broadcast_to(table[:, :1], table[:, 1:].shape))
        owners = ownership.canonical(owners)
    for index in range(spatial):
        owners = owners.narrow(-1 - index, 0, 1)
    return owners.expand(shape)


def reduce(ownership: Ownership, node: torch.fx.Node) -> Any:
    """Means, sums and extremes; over channels they see those that stay."""
    owners, shape = ownership.value(node.args[0]), ownership.trace.shapes.get(node.name)  # type: ignore[arg-type]
    name = operator_name(node)
    if shape is None:
        return ownership.unknown(node)
    dims = _reduced_dims(node, owners.ndim)
    gone = [dim for dim in dims if varies(owners, dim)]
    if not gone:
        for dim in dims:
            owners = owners.narrow(dim, 0, 1)
        return owners.reshape(shape)
    if set(varying(owners)) <= set(gone):
        if name not in SUMS:
            ownership.normalizers.add(node.name)
        return nobody(shape)
    if not ownership.is_strict:
        return nobody(shape)
    first = owners
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    ownership.sets.union(*pairs(owners, tight(first.expand(owners.shape))))
    return ownership.canonical(first).reshape(shape)


def _reduced_dims(node: torch.fx.Node, ndim: int) -> list[int]:
    position = 2 if operator_name(node) in ("linalg_vector_norm", "norm") else 1
    found = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if found is None:
        return list(range(ndim))
    listed = found if isinstance(found, (list, tuple)) else [found]
    return [int(dim) % ndim for dim in listed] or list(range(ndim))  # type: ignore[arg-type]
