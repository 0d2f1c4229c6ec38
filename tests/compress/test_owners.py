"""Tensors of owners keep their values, at the cost of what changes in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cveff.compress.owners import (
    along,
    canonical,
    channel,
    columns,
    compact,
    has_owner,
    nobody,
    tight,
    varies,
    varying,
)
from cveff.compress.union_find import NONE, UnionFind


def random_owners(seed: int) -> torch.Tensor:
    """Shape (2, 3, 4, 5), constant along a random subset of dimensions."""
    random = torch.Generator().manual_seed(seed)
    shape = [size if torch.rand((), generator=random) < 0.5 else 1 for size in (2, 3, 4, 5)]
    return torch.randint(1, 9, shape, generator=random).expand(2, 3, 4, 5).contiguous()


@pytest.mark.parametrize("seed", range(8))
def test_tight_owners_are_the_same_and_say_where_they_change(seed: int) -> None:
    owners = random_owners(seed)
    small = tight(owners)
    assert torch.equal(small, owners)
    for dim in range(4):
        changes = not (owners == owners.narrow(dim, 0, 1)).all()
        assert varies(small, dim) == changes == (dim in varying(small))
    assert compact(small).numel() == np.prod([owners.shape[dim] for dim in varying(small)], dtype=int)


@pytest.mark.parametrize("dim", range(4))
def test_columns_hold_every_place_once(dim: int) -> None:
    owners = tight(random_owners(dim))
    table = columns(owners, dim)
    assert table.shape[1] == owners.shape[dim]
    for index in range(owners.shape[dim]):
        assert set(table[:, index]) == set(owners.select(dim, index).reshape(-1).tolist())


def test_a_channel_is_read_back_along_its_dimension() -> None:
    atoms = np.asarray([3, 1, 2])
    owners = channel(atoms, 1, (2, 3, 4))
    assert varying(tight(owners)) == [1]
    assert along(owners, 1).tolist() == along(owners, -2).tolist() == [3, 1, 2]


def test_nobody_has_no_owner() -> None:
    assert not has_owner(nobody((2, 3))) and nobody(()).shape == ()
    assert has_owner(channel(np.asarray([NONE, 4]), 0, (2,)))


def test_canonical_owners_follow_their_sets() -> None:
    sets = UnionFind()
    atoms = sets.new(4)
    owners = channel(atoms, 0, (4, 6))
    sets.union(atoms[1:], np.broadcast_to(atoms[:1], 3))
    merged = canonical(owners, sets)
    assert (merged == sets.find(atoms[:1])[0]).all() and not varying(merged)
