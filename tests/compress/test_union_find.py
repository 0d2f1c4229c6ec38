"""Sets of atoms: merging is an equivalence, reasons stay with the sets, and nobody's atom stays alone."""

from __future__ import annotations

import numpy as np

from cveff.compress.union_find import NONE, UnionFind


def test_merged_atoms_have_one_representative_and_others_keep_theirs() -> None:
    sets = UnionFind()
    atoms = sets.new(6)
    sets.union(atoms[[0, 1]], atoms[[1, 2]])
    found = sets.find(atoms)
    assert len(set(found[:3])) == 1 and len(set(found[2:])) == 4


def test_it_agrees_with_connected_components() -> None:
    random = np.random.default_rng(0)
    sets, count = UnionFind(), 200
    atoms = sets.new(count)
    labels = np.arange(count)
    for _ in range(10):
        pairs = random.integers(count, size=(2, 12))
        sets.union(atoms[pairs[0]], atoms[pairs[1]])
        for a, b in pairs.T:
            labels[labels == labels[b]] = labels[a]
    found = sets.find(atoms)
    assert ((found[:, None] == found) == (labels[:, None] == labels)).all()


def test_nobody_never_merges() -> None:
    sets = UnionFind()
    atoms = sets.new(2)
    sets.union(np.asarray([NONE, NONE]), atoms)
    assert len({NONE, *sets.find(atoms)}) == 3


def test_the_first_reason_stays_and_spreads_over_what_merges_later() -> None:
    sets = UnionFind()
    atoms = sets.new(3)
    sets.freeze(atoms[:1], "first")
    sets.freeze(atoms[:1], "second")
    sets.union(atoms[:1], atoms[1:2])
    reasons = [sets.reasons[code] for code in sets.reason(atoms)]
    assert reasons == ["first", "first", ""]
    sets.freeze(np.asarray([NONE]), "nobody")
    assert "nobody" not in sets.reasons


def test_a_set_is_made_once_one_of_its_atoms_is() -> None:
    sets = UnionFind()
    table, weight = sets.new(2, is_made=False), sets.new(1)
    sets.union(table[:1], weight)
    assert sets.is_made(table).tolist() == [True, False]


def test_the_version_changes_only_when_something_does() -> None:
    sets = UnionFind()
    atoms = sets.new(3)
    before = sets.version
    sets.union(atoms[:1], atoms[1:2])
    merged = sets.version
    sets.union(atoms[1:2], atoms[:1])
    assert before != merged == sets.version
    sets.freeze(atoms[2:], "why")
    assert sets.version != merged
