"""Rules of products of two values: attention, with heads or with the dimensions inside every head as units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cveff.compress.owners import (
    columns,
    has_owner,
    nobody,
    pairs,
    tight,
    varies,
    varying,
)
from cveff.compress.rule_pointwise import combine, is_made
from cveff.compress.rule_weights import project

if TYPE_CHECKING:
    from cveff.compress.ownership import Ownership


def matmul(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """A product with a weight (a linear layer) or of two values."""
    first, second = node.args[:2]
    assert isinstance(first, torch.fx.Node) and isinstance(second, torch.fx.Node)
    if ownership.parameter(second) is not None and len(ownership.trace.shapes[second.name]) == 2:
        return project(ownership, node, first, second, out_dim=1)
    a, b = ownership.value(first), ownership.value(second)
    if a.ndim < 2 or b.ndim < 2:
        return ownership.unknown(node)
    return _contract(ownership, a, b, ownership.trace.shapes[node.name], ownership.where(node))


def _contract(
    ownership: Ownership, a: torch.Tensor, b: torch.Tensor, shape: tuple[int, ...], where: str
) -> torch.Tensor:
    """Owners of a (…, n, k) @ b (…, k, m)."""
    a, b = _without_table(ownership, a, varies(b, -2)), _without_table(ownership, b, varies(a, -1))
    if varies(a, -1) or varies(b, -2):
        batch = max(a.ndim, b.ndim) - 2
        left = a.transpose(-1, -2)[..., :1].expand(*_lead(a, b), a.shape[-1], 1)  # (…, k, 1)
        right = b[..., :1].expand(*_lead(a, b), b.shape[-2], 1)
        if varies(a, -2) or varies(b, -1):
            if ownership.is_strict:
                for value in (a, b):
                    ownership.freeze(value, f"{where} multiplies channels with channels")
            return nobody(shape)
        left, right = tight(left), tight(right)
        heads = [dim for dim in range(batch) if varies(left, dim) or varies(right, dim)]
        if ownership.attention == "heads" and heads and _is_shared(ownership, left, right, batch, where):
            both = left if any(varies(left, dim) for dim in heads) else right
        else:
            both = combine(ownership, [left, right], tuple(left.shape), where)
        if heads and ownership.attention == "heads":
            first = both.narrow(-2, 0, 1).expand(both.shape)
            ownership.sets.union(*pairs(tight(both), tight(first)))
            return ownership.canonical(first[..., :1, :].expand(shape))
        if heads:
            _merge_along(ownership, both, both.ndim - 2)
        return nobody(shape)
    rows = a.select(-1, 0).unsqueeze(-1)  # (…, n, 1)
    cols = b.select(-2, 0).unsqueeze(-2)  # (…, 1, m)
    left, right = tight(rows.expand(shape)), tight(cols.expand(shape))
    if not has_owner(left) or not has_owner(right):
        return right if has_owner(right) else left
    leading = range(len(shape) - 2)
    if ownership.attention == "heads" and any(varies(left, dim) or varies(right, dim) for dim in leading):
        if _is_shared(ownership, left, right, len(shape) - 2, where):
            owner = left if any(varies(left, dim) for dim in leading) else right
            _tie_batches(ownership, owner, owner, shape)
            return ownership.canonical(owner)
        _tie_batches(ownership, left, right, shape)
        return ownership.canonical(left)
    if varies(left, -2) and varies(right, -1) and ownership.is_strict:
        for value in (left, right):
            ownership.freeze(value, f"{where} multiplies channels with channels")
        return left
    return combine(ownership, [left, right], shape, where)


def _without_table(ownership: Ownership, owners: torch.Tensor, is_contracted: bool) -> torch.Tensor:
    """Owners of one factor; nobody where they are a table's (relative positions) and meet no channels."""
    return owners if is_contracted or is_made(ownership, owners) else nobody(tuple(owners.shape))


def _is_shared(ownership: Ownership, left: torch.Tensor, right: torch.Tensor, batch: int, where: str) -> bool:
    """Whether all heads of one side use the same channels of the other (multi-query); those then stay."""
    own = [any(varies(value, dim) for dim in range(batch)) for value in (left, right)]
    if own[0] == own[1]:
        return False
    shared = right if own[0] else left
    if not varying(shared):
        return False
    ownership.freeze(shared, f"{where} shares it among heads")
    return True


def _tie_batches(
    ownership: Ownership, left: torch.Tensor, right: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Merge all owners within each batch entry (head) of two values of `shape`."""
    for value in (left, right):
        first = left[..., :1, :1].expand(shape)
        ownership.sets.union(*pairs(tight(value), tight(first)))


def _merge_along(ownership: Ownership, owners: torch.Tensor, dim: int) -> None:
    """Merge owners that share an index along `dim`."""
    table = columns(tight(owners), dim)
    ownership.sets.union(table[1:], np.broadcast_to(table[:1], table[1:].shape))


def attention(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """`scaled_dot_product_attention`, whose scale an edit fixes where heads become narrower."""
    query, key, value = (ownership.value(item) for item in node.args[:3])  # type: ignore[arg-type]
    where = ownership.where(node)
    lead = (*torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]),)
    if query.shape[:-2] != key.shape[:-2] and all(
        q != k and k > 1 for q, k in zip(query.shape[:-2], key.shape[:-2], strict=True)
    ):
        return ownership.unknown(node)
    scores = (*lead, query.shape[-2], key.shape[-2])
    found = _contract(ownership, query, key.transpose(-1, -2), scores, where)
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if isinstance(mask, torch.fx.Node):
        found = combine(ownership, [found, ownership.value(mask)], scores, where)
    return _contract(ownership, found, value, ownership.trace.shapes[node.name], where)


def _lead(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
