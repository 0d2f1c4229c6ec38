"""Rules of convolutions and linear layers: new channels come out, the ones that go in are used up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cveff.compress.owners import (
    channel,
    varies,
    varying,
)
from cveff.compress.rule_pointwise import combine
from cveff.compress.union_find import NONE

if TYPE_CHECKING:
    from cveff.compress.ownership import Ownership


def convolve(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """A convolution: new channels, tied to the ones that go in where it is grouped."""
    weight: Any = node.args[1]
    path = ownership.parameter(weight)
    if path is None:
        return ownership.unknown(node, "has a computed weight")
    groups = int(node.args[6]) if len(node.args) > 6 else int(node.kwargs.get("groups", 1))  # type: ignore[arg-type]
    shape = ownership.trace.shapes[weight.name]
    owners = ownership.value(node.args[0])  # type: ignore[arg-type]
    outputs = ownership.weight(path, 0, shape[0])
    changing = varying(owners)
    inputs = None
    if not changing or 1 in changing:
        inputs = ownership.collapse(owners, 1, f"{ownership.where(node)} mixes it with constants")
    elif ownership.is_strict:
        is_batch = changing == [0]
        return ownership.unknown(node, "is one for all heads" if is_batch else "slides over channels")
    if inputs is not None:
        if groups == 1:
            ownership.use(path, 1, inputs, "in")
        else:
            _group(ownership, node, path, inputs, outputs, groups, shape)
    _bias(ownership, node, 2, outputs)
    return channel(ownership.sets.find(outputs), 1, ownership.trace.shapes[node.name])


def convolve_transposed(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """A transposed convolution, whose weight has its inputs first."""
    weight: Any = node.args[1]
    path = ownership.parameter(weight)
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    owners = ownership.value(node.args[0])  # type: ignore[arg-type]
    if path is None or groups != 1 or (varying(owners) and 1 not in varying(owners)):
        return ownership.unknown(node, "has groups, a computed weight, or slides over channels")
    outputs = ownership.weight(path, 1, ownership.trace.shapes[weight.name][1])
    inputs = ownership.collapse(owners, 1, f"{ownership.where(node)} mixes it with constants")
    if inputs is not None:
        ownership.use(path, 0, inputs, "in")
    _bias(ownership, node, 2, outputs)
    return channel(ownership.sets.find(outputs), 1, ownership.trace.shapes[node.name])


def _group(
    ownership: Ownership,
    node: torch.fx.Node,
    path: str,
    inputs: np.ndarray,
    outputs: np.ndarray,
    groups: int,
    shape: tuple[int, ...],
) -> None:
    """Couple the two sides of a grouped convolution."""
    if not (inputs != NONE).any():
        ownership.sets.freeze(outputs, f"{ownership.where(node)} has groups of constants")
        return
    by_group = outputs.reshape(groups, -1)
    into = inputs.reshape(groups, -1)
    is_depthwise = shape[1] == 1
    ownership.roles[(path, 0)] = "scale" if is_depthwise else "out"
    if is_depthwise or groups >= 8:
        # Whole groups go: their width is what makes the kernel fast, and what was trained.
        everyone = np.concatenate([by_group, into], axis=1)
        ownership.sets.union(everyone[:, 1:], np.broadcast_to(everyone[:, :1], everyone[:, 1:].shape))
        ownership.grouped[node.name] = (path, groups)
    else:
        for table in (by_group, into):
            ownership.sets.union(table[1:], np.broadcast_to(table[:1], table[1:].shape))
        ownership.use(path, 1, into[0], "in")
    if (inputs == NONE).any():
        ownership.sets.freeze(inputs, f"{ownership.where(node)} mixes it with constants")


def _bias(
    ownership: Ownership, node: torch.fx.Node, position: int, outputs: np.ndarray, name: str = "bias"
) -> None:
    bias = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    if bias is None:
        return
    path = ownership.parameter(bias)
    if path is None:
        value = ownership.value(bias)  # type: ignore[arg-type]
        made = channel(ownership.sets.find(outputs), 0, (len(outputs),))
        combine(ownership, [made, value], (len(outputs),), ownership.where(node))
    else:
        ownership.use(path, 0, outputs, "out")


def _consumed(
    ownership: Ownership, owners: torch.Tensor, outputs: np.ndarray, node: torch.fx.Node
) -> np.ndarray | None:
    """Owners along the last dimension, which a weight sums over; None where not known yet, or never."""
    if not varies(owners, -1) and varying(owners):
        if ownership.is_strict:
            # It sums over positions, not channels: each output belongs to the input's channel as well.
            ownership.sets.freeze(outputs, f"{ownership.where(node)} mixes positions")
        return None
    return ownership.collapse(owners, -1, f"{ownership.where(node)} mixes it with constants")


def linear(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """A linear layer over the last dimension."""
    return project(ownership, node, node.args[0], node.args[1], out_dim=0)  # type: ignore[arg-type]


def addmm(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """A linear layer as `bias + value @ weight`."""
    bias, value, weight = node.args[:3]
    outputs = project(ownership, node, value, weight, out_dim=1)  # type: ignore[arg-type]
    return combine(ownership, [outputs, ownership.value(bias)], tuple(outputs.shape), ownership.where(node))  # type: ignore[arg-type]


def project(
    ownership: Ownership, node: torch.fx.Node, value: torch.fx.Node, weight: torch.fx.Node, out_dim: int
) -> torch.Tensor:
    """`value` times a weight whose outputs lie along `out_dim`, over the last dimension."""
    path = ownership.parameter(weight)
    if path is None:
        return ownership.unknown(node)
    owners, shape = ownership.value(value), ownership.trace.shapes[node.name]
    outputs = ownership.weight(path, out_dim, ownership.trace.shapes[weight.name][out_dim])
    inputs = _consumed(ownership, owners, outputs, node)
    if inputs is not None:
        ownership.use(path, 1 - out_dim, inputs, "in")
    if out_dim == 0:
        _bias(ownership, node, 2, outputs)
    if not varies(owners, -1) and varying(owners):
        return owners.select(-1, 0).unsqueeze(-1).expand(shape)
    return channel(ownership.sets.find(outputs), len(shape) - 1, shape)
