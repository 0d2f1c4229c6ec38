"""Sets of atoms that merge: whole arrays at a time."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

NONE = 0
"""The atom of values that belong to no channel. It never merges with another."""


class UnionFind:
    """Disjoint sets of integers, with a reason attached to sets that must not be taken apart."""

    def __init__(self) -> None:
        self._parent = np.zeros(1, np.int64)
        self._frozen = np.zeros(1, np.int32)
        self._made = np.zeros(1, bool)
        self.reasons: list[str] = [""]

    def new(self, count: int, is_made: bool = True) -> np.ndarray:
        """`count` fresh atoms, (count,) int64.

        Args:
            is_made: whether a weight makes them; entries of a table that is only added or multiplied are not.
        """
        first = len(self._parent)
        atoms = np.arange(first, first + count)
        self._parent = np.concatenate([self._parent, atoms])
        self._frozen = np.concatenate([self._frozen, np.zeros(count, np.int32)])
        self._made = np.concatenate([self._made, np.full(count, is_made)])
        return atoms

    def find(self, atoms: np.ndarray) -> np.ndarray:
        """The representative of each atom's set; same shape."""
        roots = self._parent[atoms]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                return roots
            roots = above

    def union(self, first: np.ndarray, second: np.ndarray) -> None:
        """Merge the sets of `first[i]` and `second[i]`; pairs with `NONE` are skipped."""
        a, b = self.find(first.ravel()), self.find(second.ravel())
        differ = (a != b) & (a != NONE) & (b != NONE)
        if not differ.any():
            return
        pairs = np.unique(np.stack([a[differ], b[differ]]), axis=1)
        roots, compact = np.unique(pairs, return_inverse=True)
        compact = compact.reshape(pairs.shape)
        graph = coo_matrix((np.ones(pairs.shape[1]), tuple(compact)), shape=(len(roots), len(roots)))
        count, labels = connected_components(graph, directed=False)
        smallest = np.full(count, np.iinfo(np.int64).max)
        np.minimum.at(smallest, labels, roots)
        frozen = np.zeros(count, np.int32)
        np.maximum.at(frozen, labels, self._frozen[roots])
        made = np.zeros(count, bool)
        np.logical_or.at(made, labels, self._made[roots])
        self._parent[roots] = smallest[labels]
        self._made[smallest] = made
        self._frozen[smallest] = frozen

    def freeze(self, atoms: np.ndarray, reason: str) -> None:
        """Mark the sets of `atoms`; the first reason given stays."""
        roots = np.unique(self.find(atoms.ravel()))
        roots = roots[(roots != NONE) & (self._frozen[roots] == 0)]
        if len(roots):
            if reason not in self.reasons:
                self.reasons.append(reason)
            self._frozen[roots] = self.reasons.index(reason)

    def is_made(self, atoms: np.ndarray) -> np.ndarray:
        """Whether a weight makes each atom's set; bool of the same shape."""
        return self._made[self.find(atoms)]

    def reason(self, atoms: np.ndarray) -> np.ndarray:
        """Index into `reasons` of each atom's set; 0 where it is free."""
        return self._frozen[self.find(atoms)]

    @property
    def version(self) -> int:
        """Changes whenever sets merge or freeze."""
        return int((self._parent != np.arange(len(self._parent))).sum()) * 2 + int((self._frozen > 0).sum())


def count_merged(table: np.ndarray) -> int:
    """How many sets are left once everything in a column of `table`, (rows, columns) int64, is merged."""
    atoms, compact = np.unique(table, return_inverse=True)
    compact = compact.reshape(table.shape)
    real = (table[1:] != NONE) & (table[:1] != NONE)
    first = np.broadcast_to(compact[:1], compact[1:].shape)[real]
    graph = coo_matrix((np.ones(len(first)), (first, compact[1:][real])), shape=(len(atoms), len(atoms)))
    return int(connected_components(graph, directed=False)[0]) - int((atoms == NONE).any())
