"""Sums over the slices of a parameter that belong to one unit of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cveff.errors import StepError

if TYPE_CHECKING:
    from cveff.compress.groups import Group, Member


def per_index(tensor: Tensor, dim: int) -> Tensor:
    """Sum `tensor` over every dimension but `dim`: (tensor.shape[dim],) float64."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1).sum(1, dtype=torch.float64)


def per_unit(values: Tensor, units: np.ndarray, size: int) -> np.ndarray:
    """Sum `values`, one an index, over the indices of each unit: (size,) float64; indices of unit -1 are left out."""
    mine = units >= 0
    return np.bincount(units[mine], weights=values.detach().cpu().double().numpy()[mine], minlength=size)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """State-dict path -> parameter; tied parameters under each of their names, so every member finds its own."""
    return dict(module.named_parameters(remove_duplicate=False))


def check_groups(module: nn.Module, groups: Sequence[Group]) -> None:
    """Refuse groups that belong to another network.

    Raises:
        StepError: a member's parameter does not exist, or has another size.
    """
    state = module.state_dict(keep_vars=True)
    for group in groups:
        for member in group.members:
            if member.parameter not in state:
                raise StepError(
                    f"group {group.name}: the network has no {member.parameter}; analyze it again"
                )
            if state[member.parameter].shape[member.dim] != len(member.units):
                raise StepError(
                    f"group {group.name}: {member.parameter} has shape {tuple(state[member.parameter].shape)} and "
                    f"{len(member.units)} units along {member.dim}; analyze the network again"
                )


def is_bias(member: Member) -> bool:
    """Whether the parameter only shifts its channel."""
    return member.parameter.rpartition(".")[2] == "bias"


def owner(module: nn.Module, member: Member) -> tuple[str, nn.Module]:
    """Path and module whose parameter it is."""
    path = member.parameter.rpartition(".")[0]
    return path, module.get_submodule(path)


def finite(values: np.ndarray, group: str, criterion: str) -> np.ndarray:
    """`values`, if all are finite.

    Raises:
        StepError: some are not.
    """
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise StepError(
            f"{criterion} importance of group {group} is {values[bad[0]]} at unit {bad[0]}; "
            "the network's weights or activations overflow: check them"
        )
    return values


def zero_scores(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Group name -> (size,) float64 zeros."""
    return {group.name: np.zeros(group.size) for group in groups}


def device_of(module: nn.Module) -> torch.device:
    """Where the network's first parameter lies."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
