"""An optimizer's state, carried into the larger network: kept for old weights, fresh for new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cveff.train.growth.placement import Placement
from cveff.train.optimizers import MatrixMuon, ScheduledOptimizers, as_matrix


def carry_weights(old: nn.Module, new: nn.Module, placement: Placement) -> None:
    """Put `old`'s parameters and buffers into `new`, in place."""
    into = new.state_dict()
    for name, value in old.state_dict().items():
        placement.put(name, value, into[name])


def carry_optimizer(
    old: ScheduledOptimizers,
    new: ScheduledOptimizers,
    modules: tuple[nn.Module, nn.Module],
    placement: Placement,
) -> None:
    """Give `new` the state that `old` has of `modules`' parameters.

    State of a parameter's shape goes to the old weights' places, with zeros around it; counters are kept. State of any
    other shape says nothing about a larger matrix, so that such a parameter begins anew.
    """
    before, after = (_state_by_name(*pair) for pair in zip((old, new), modules, strict=True))
    for name, (state, parameter, is_matrix) in before.items():
        if name not in after or not state:
            continue
        _, grown, _ = after[name]
        carried = _grown_state(name, state, parameter, grown, is_matrix, placement)
        if carried is not None:
            _set_state(new, grown, carried)


def _grown_state(
    name: str,
    state: Mapping[str, Any],
    parameter: nn.Parameter,
    grown: nn.Parameter,
    is_matrix: bool,
    placement: Placement,
) -> dict[str, Any] | None:
    carried: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            carried[key] = value.clone() if isinstance(value, Tensor) else value
            continue
        if is_matrix:
            kernel = torch.empty_like(parameter, dtype=value.dtype)
            as_matrix(kernel.detach()).copy_(value)
            value = kernel.detach()
        if not placement.holds(name, value, grown):
            return None
        made = torch.zeros_like(grown, dtype=value.dtype).detach()
        placement.put(name, value, made)
        carried[key] = as_matrix(made).clone() if is_matrix else made
    return carried


def _state_by_name(
    optimizers: ScheduledOptimizers, module: nn.Module
) -> dict[str, tuple[Mapping[str, Any], nn.Parameter, bool]]:
    """Name -> state, parameter, and whether the state is that of the parameter as a matrix."""
    found: dict[str, tuple[Mapping[str, Any], nn.Parameter, bool]] = {}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer in optimizers.optimizers:
        if isinstance(optimizer, MatrixMuon):
            for kernel, state in optimizer.kernel_states():
                if id(kernel) in names:
                    found[names[id(kernel)]] = (state, kernel, True)
            continue
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in names:
                    found[names[id(parameter)]] = (optimizer.state.get(parameter, {}), parameter, False)
    return found


def _set_state(optimizers: ScheduledOptimizers, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    for optimizer in optimizers.optimizers:
        if isinstance(optimizer, MatrixMuon):
            if optimizer.set_kernel_state(parameter, state):
                return
        elif any(item is parameter for group in optimizer.param_groups for item in group["params"]):
            optimizer.state[parameter] = state
            return
