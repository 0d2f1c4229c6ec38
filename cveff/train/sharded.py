"""Weights of which every rank holds a part (FSDP2's DTensors), and the same as whole tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cveff.errors import CheckpointError


def is_sharded(value: object) -> bool:
    """Whether `value` is a tensor of which this process holds a part."""
    return hasattr(value, "full_tensor")


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this process holds; a whole tensor as it is."""
    return value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]


def whole(tree: Any) -> Any:
    """Nested dicts and lists with whole tensors in place of sharded ones, which all ranks must ask for together."""
    if isinstance(tree, Mapping):
        return {key: whole(item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [whole(item) for item in tree]
    return tree.full_tensor() if is_sharded(tree) else tree


def cut_like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, which every rank has whole, cut as `parameter` is."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    replicated = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=parameter.placements)


@torch.no_grad()
def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Strictly load whole tensors into a network, sharded or not.

    Raises:
        CheckpointError: it has other weights.
    """
    own = module.state_dict()
    if not any(map(is_sharded, own.values())):
        module.load_state_dict(state)
        return
    if own.keys() != state.keys():
        raise CheckpointError(
            f"the state has other weights than the network: {sorted(own.keys() ^ state.keys())[:3]}"
        )
    for name, value in own.items():
        value.copy_(cut_like(state[name].to(value.device), value))


def cut_moments(state: Mapping[str, Any], optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """The state of `ScheduledOptimizers`, with moments cut as the parameters are that they belong to."""
    return {
        key: {**saved, "state": _cut_state(saved["state"], optimizers[int(key)])}
        for key, saved in state.items()
    }


def _cut_state(state: Mapping[int, Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found: dict[int, Any] = {}
    for index, moments in state.items():
        parameter = parameters[index]
        # GaLore's moments lie in bases that every rank holds whole.
        fits = is_sharded(parameter) and not {"left", "right"} & moments.keys()
        found[index] = {
            name: cut_like(value.to(parameter.device), parameter)
            if fits and isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for name, value in moments.items()
        }
    return found
