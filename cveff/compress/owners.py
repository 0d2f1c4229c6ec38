"""Tensors of atoms: which channel each element of a value belongs to.

They have the value's shape, but along dimensions where the owner does not change their stride is 0, so a feature
map's owners cost as much memory as its channels.
"""

from __future__ import annotations

import numpy as np
import torch

from cveff.compress.union_find import NONE, UnionFind


def nobody(shape: tuple[int, ...]) -> torch.Tensor:
    """Owners of a value that belongs to no channel, int64 of `shape`."""
    return torch.full((1,), NONE, dtype=torch.int64).expand(shape or (1,)).reshape(shape)


def compact(owners: torch.Tensor) -> torch.Tensor:
    """One entry along every dimension where nothing changes; the others whole."""
    for dim in range(owners.ndim):
        if owners.shape[dim] > 1 and owners.stride(dim) == 0:
            owners = owners.narrow(dim, 0, 1)
    return owners


def tight(owners: torch.Tensor) -> torch.Tensor:
    """The same owners with stride 0 wherever they can have it."""
    small = compact(owners)
    for dim in range(small.ndim):
        if small.shape[dim] > 1:
            first = small.narrow(dim, 0, 1)
            if bool((small == first).all()):
                small = first
    return small.contiguous().expand(owners.shape)


def varies(owners: torch.Tensor, dim: int) -> bool:
    """Whether tight `owners` change along `dim`."""
    return owners.shape[dim] > 1 and owners.stride(dim) != 0


def varying(owners: torch.Tensor) -> list[int]:
    """The dimensions along which tight `owners` change."""
    return [dim for dim in range(owners.ndim) if varies(owners, dim)]


def has_owner(owners: torch.Tensor) -> bool:
    """Whether any element belongs to a channel."""
    return bool((compact(owners) != NONE).any())


def canonical(owners: torch.Tensor, sets: UnionFind) -> torch.Tensor:
    """Every atom replaced by its set's representative; tight."""
    small = compact(owners)
    found = torch.from_numpy(sets.find(small.reshape(-1).numpy())).reshape(small.shape)
    return tight(found.expand(owners.shape))


def along(owners: torch.Tensor, dim: int) -> np.ndarray:
    """Owners along `dim` of a value that changes along no other, (size,) int64."""
    dim %= owners.ndim
    for other in reversed(range(owners.ndim)):
        if other != dim:
            owners = owners.select(other, 0)
    return owners.numpy().copy()


def columns(owners: torch.Tensor, dim: int) -> np.ndarray:
    """Everything that shares an index along `dim`, (others, size) int64, one entry a distinct place."""
    small = compact(owners)
    if small.shape[dim] != owners.shape[dim]:
        shape = list(small.shape)
        shape[dim] = owners.shape[dim]
        small = small.expand(shape)
    moved: np.ndarray = small.movedim(dim, -1).reshape(-1, owners.shape[dim]).numpy()
    return moved


def pairs(first: torch.Tensor, second: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Two owners' tensors of one shape as arrays of the distinct places."""
    for dim in range(first.ndim):
        if first.shape[dim] > 1 and first.stride(dim) == 0 and second.stride(dim) == 0:
            first, second = first.narrow(dim, 0, 1), second.narrow(dim, 0, 1)
    return first.reshape(-1).numpy(), second.reshape(-1).numpy()


def channel(owners: np.ndarray, dim: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A value of `shape` whose owners are given along `dim`."""
    view = [1] * len(shape)
    view[dim] = len(owners)
    return torch.from_numpy(owners.copy()).reshape(view).expand(shape)
