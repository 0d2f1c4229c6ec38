"""Rules of norms and other per-channel parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cveff.compress.operators import operator_name
from cveff.compress.owners import (
    varies,
    varying,
)
from cveff.compress.rule_pointwise import combine

if TYPE_CHECKING:
    from cveff.compress.ownership import Ownership


def batch_norm(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """Batch or instance norm: parameters and statistics follow the channels of dimension 1."""
    owners = ownership.value(node.args[0])  # type: ignore[arg-type]
    if operator_name(node) == "batch_norm" and bool(node.args[5]):
        return ownership.unknown(
            node
        )  # statistics of the batch: it is a standardised weight, or training mode
    channels = ownership.collapse(owners, 1, f"{ownership.where(node)} mixes it with constants")
    if channels is not None:
        for item in node.args[1:5]:
            path = ownership.parameter(item)
            if path is not None:
                ownership.use(path, 0, channels, "scale")
    return owners


def layer_norm(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """Layer or RMS norm: parameters follow the last dimension, statistics are over the channels that stay."""
    owners = ownership.value(node.args[0])  # type: ignore[arg-type]
    count = len(node.args[1])  # type: ignore[arg-type]
    for item in node.args[2:4]:
        path = ownership.parameter(item)
        if path is None:
            continue
        if count > 1:
            combine(ownership, [owners, ownership.table(item)], tuple(owners.shape), ownership.where(node))  # type: ignore[arg-type]
        elif varies(owners, -1) or not varying(owners):
            channels = ownership.collapse(owners, -1, f"{ownership.where(node)} mixes it with constants")
            if channels is not None:
                ownership.use(path, 0, channels, "scale")
    if any(varies(owners, -1 - index) for index in range(count)):
        ownership.normalizers.add(node.name)
    return owners


def group_norm(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """Group norm: a whole group of it goes, or with one group single channels."""
    owners = ownership.value(node.args[0])  # type: ignore[arg-type]
    groups = int(node.args[1])  # type: ignore[arg-type]
    channels = ownership.collapse(owners, 1, f"{ownership.where(node)} mixes it with constants")
    if channels is None:
        return owners
    if groups > 1:
        table = channels.reshape(groups, -1)
        ownership.sets.union(table[:, 1:], np.broadcast_to(table[:, :1], table[:, 1:].shape))
        ownership.norm_groups[node.name] = groups
    else:
        ownership.normalizers.add(node.name)
    for item in node.args[2:4]:
        path = ownership.parameter(item)
        if path is not None:
            ownership.use(path, 0, channels, "scale")
    return owners


def prelu(ownership: Ownership, node: torch.fx.Node) -> torch.Tensor:
    """One slope for all channels, or one each."""
    weight: Any = node.args[1]
    owners, path = ownership.value(node.args[0]), ownership.parameter(weight)  # type: ignore[arg-type]
    channels = ownership.collapse(owners, 1, f"{ownership.where(node)} mixes it with constants")
    if path is None:
        return ownership.unknown(node)
    if channels is not None and ownership.trace.shapes[weight.name] == (len(channels),):
        ownership.use(path, 0, channels, "scale")
    return owners
