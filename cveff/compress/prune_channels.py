"""The edit that takes channels out: which indices of every parameter stay, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cveff.compress.caches import caches
from cveff.compress.flexible import make_flexible
from cveff.errors import CheckpointError


@dataclass(frozen=True)
class PruneChannels:
    """Slice parameters and buffers, and set the sizes that modules keep in attributes.

    Attributes:
        keep: path of a parameter or buffer -> dimension (as text) -> indices that stay, ascending.
        attributes: path of a module -> attribute -> value, for sizes that its code holds (`num_heads`, `groups`).
        flexible: path of a module -> name of a call in its forward ("reshape 2") -> what that call gets instead of
            what the code says; see `flexible.py`.
    """

    keep: Mapping[str, Mapping[str, Sequence[int]]]
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    flexible: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    kind: ClassVar[str] = "prune_channels"

    def apply(self, module: nn.Module) -> nn.Module:
        """Slice `module` in place and return it.

        Raises:
            CheckpointError: a path does not exist, or an index is out of range: the edit was made for another
                network.
        """
        for cache in caches(module):
            cache.clear()
        touched: dict[str, nn.Module] = {}
        for path, dims in self.keep.items():
            owner_path, _, name = path.rpartition(".")
            owner = _submodule(module, owner_path, path)
            tensor = getattr(owner, name, None)
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointError(f"the network has no parameter {path} to prune; the edit is another's")
            _replace(owner, name, _sliced(tensor, dims, path))
            touched[owner_path] = owner
        for path, values in self.attributes.items():
            owner = _submodule(module, path, path)
            for name, value in values.items():
                if not hasattr(owner, name):
                    raise CheckpointError(f"{path} has no attribute {name}; the edit is another's")
                setattr(owner, name, tuple(value) if isinstance(value, list) else value)
        for owner in touched.values():
            _follow_weights(owner)
        for path, calls in self.flexible.items():
            _submodule(module, path, path)
            make_flexible(module, path, calls)
        return module


def _submodule(module: nn.Module, path: str, what: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"the network has no {what} to prune; the edit is another's") from None


def _sliced(tensor: torch.Tensor, dims: Mapping[str, Sequence[int]], path: str) -> torch.Tensor:
    for dim, indices in dims.items():
        if int(dim) >= tensor.ndim or (len(indices) and max(indices) >= tensor.shape[int(dim)]):
            raise CheckpointError(
                f"{path} has shape {tuple(tensor.shape)}, which does not hold what the edit keeps along "
                f"dimension {dim}; the edit is another's"
            )
        tensor = tensor.index_select(int(dim), torch.tensor(list(indices), device=tensor.device))
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _replace(owner: nn.Module, name: str, value: torch.Tensor) -> None:
    old = getattr(owner, name)
    if isinstance(old, nn.Parameter):
        setattr(owner, name, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        setattr(owner, name, value)


def _follow_weights(owner: nn.Module) -> None:
    """Set the sizes torch's own layers keep beside their weights."""
    weight = getattr(owner, "weight", None)
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
    elif isinstance(owner, nn.modules.conv._ConvNd):
        first, second = owner.weight.shape[0], owner.weight.shape[1] * owner.groups
        owner.out_channels, owner.in_channels = (second, first) if owner.transposed else (first, second)
    elif isinstance(owner, _NormBase):
        statistics = owner.running_mean if weight is None else weight
        owner.num_features = len(statistics) if statistics is not None else owner.num_features
    elif isinstance(owner, nn.GroupNorm) and isinstance(weight, torch.Tensor):
        owner.num_channels = len(weight)
    elif isinstance(owner, nn.PReLU):
        owner.num_parameters = len(owner.weight)
    elif isinstance(weight, torch.Tensor) and isinstance(getattr(owner, "normalized_shape", None), tuple):
        vars(owner)["normalized_shape"] = tuple(weight.shape)  # layer norms, torch's and others'
