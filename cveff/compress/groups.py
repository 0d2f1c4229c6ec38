"""Groups of channels that can be pruned, and what pruning them does to every weight, shape and attribute.

Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023) names the problem; the analysis is ours (see
`ownership.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from cveff.compress.owners import along, canonical, varying
from cveff.compress.ownership import Ownership
from cveff.compress.trace import Trace
from cveff.compress.union_find import NONE

Role = Literal["out", "in", "scale"]


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one parameter or buffer that a group's channels lie along.

    Attributes:
        parameter: path in the state dict.
        dim: the dimension.
        role: "out" where the channel is made, "in" where it is consumed, "scale" for per-channel factors,
            offsets, tables and statistics.
        units: (size of the dimension,) int64: the unit each index belongs to, -1 where it is none of this group.
    """

    parameter: str
    dim: int
    role: Role
    units: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """Units (channels, heads, groups of a convolution) that are interchangeable; each goes or stays as a whole.

    Attributes:
        name: path of the first module that makes them.
        size: number of units.
        members: every place that holds a share of them.
        reason: why it must stay whole; empty where it may be pruned.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Channels:
    """Groups, and where their units lie along every value of the graph.

    Attributes:
        groups: what may be pruned.
        frozen: what may not, with the reason.
        layouts: node name -> dimension -> (group index, unit) of every index along it, (size, 2) int64; group -1:
            of no group that may be pruned.
    """

    trace: Trace
    groups: tuple[Group, ...]
    frozen: tuple[Group, ...]
    layouts: Mapping[str, Mapping[int, np.ndarray]]

    def shapes(self, keep: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
        """Shape of every value once only the units of `keep` are left.

        Args:
            keep: group name -> bool (size,); groups that are not named stay whole.
        """
        masks = [keep.get(group.name, np.ones(group.size, bool)) for group in self.groups]
        shapes = dict(self.trace.shapes)
        for name, dims in self.layouts.items():
            shape = list(shapes[name])
            for dim, places in dims.items():
                shape[dim] = int(kept(places, masks).sum())
            shapes[name] = tuple(shape)
        return shapes


def kept(places: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """Which indices stay: `places` (size, 2) of (group, unit), `masks` one bool array a group -> bool (size,)."""
    stays = np.ones(len(places), bool)
    for index in np.unique(places[:, 0]):
        if index >= 0:
            mine = places[:, 0] == index
            stays[mine] = masks[index][places[mine, 1]]
    return stays


def find_channels(ownership: Ownership) -> Channels:
    """Collect owners into groups: sets with a share in the same dimensions are interchangeable."""
    sets, trace = ownership.sets, ownership.trace
    slices = _slices(ownership)
    places: dict[int, list[tuple[str, int]]] = defaultdict(list)  # root -> the dimensions it has a share in
    for key, owners in slices.items():
        for root in np.unique(owners):
            if root != NONE:
                places[int(root)].append(key)
    makers = _makers(ownership)
    families: dict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
    for root in sorted(places):
        if any(key in makers for key in places[root]):
            families[tuple(sorted(places[root]))].append(root)
    order = {key: index for index, key in enumerate(makers)}
    groups: list[Group] = []
    frozen: list[Group] = []
    where: dict[int, tuple[int, int]] = {}
    names: dict[str, int] = defaultdict(int)
    for keys, roots in sorted(
        families.items(), key=lambda item: min(order.get(key, 10**9) for key in item[0])
    ):
        first = min((key for key in keys if key in order), key=lambda key: order[key])
        base = first[0].rpartition(".")[0] or first[0]
        reasons = sets.reason(np.asarray(roots))
        for is_frozen in (False, True):
            chosen = [root for root, reason in zip(roots, reasons, strict=True) if bool(reason) == is_frozen]
            if not chosen:
                continue
            reason = sets.reasons[int(reasons[roots.index(chosen[0])])] if is_frozen else ""
            if len(chosen) == 1 and not is_frozen:
                reason = "all of it lives and dies as one"
            name = f"{base}#{names[base]}" if names[base] else base
            names[base] += 1
            units = {root: unit for unit, root in enumerate(chosen)}
            members = tuple(
                Member(path, dim, ownership.roles[(path, dim)], _units(slices[(path, dim)], units))  # type: ignore[arg-type]
                for path, dim in keys
            )
            group = Group(name, len(chosen), members, reason)
            if reason:
                frozen.append(group)
            else:
                where |= {root: (len(groups), unit) for root, unit in units.items()}
                groups.append(group)
    return Channels(trace, tuple(groups), tuple(frozen), _layouts(ownership, where))


def _slices(ownership: Ownership) -> dict[tuple[str, int], np.ndarray]:
    """(path, dim) -> canonical owners along it, for every parameter that has any."""
    sets = ownership.sets
    found = {key: sets.find(owners) for key, owners in ownership.weights.items() if (owners != NONE).any()}
    for path, table in ownership.tables.items():
        owners = canonical(table, sets)
        changing = varying(owners) or ([_single(owners)] if _single(owners) is not None else [])
        if len(changing) == 1 and changing[0] is not None:
            found[(path, changing[0])] = along(owners, changing[0])
            ownership.roles.setdefault((path, changing[0]), "scale")
    return found


def _single(owners: torch.Tensor) -> int | None:
    """The dimension of a table that belongs to one unit as a whole and has one dimension above size 1."""
    wide = [dim for dim in range(owners.ndim) if owners.shape[dim] > 1]
    return wide[0] if len(wide) == 1 else None


def _makers(ownership: Ownership) -> list[tuple[str, int]]:
    """Weights that bring channels into being, in the order they run."""
    found: list[tuple[str, int]] = []
    paths = ownership.trace.parameters
    for node in ownership.trace.nodes:
        for item in node.all_input_nodes:
            path = paths.get(item.name)
            for dim in (0, 1):
                key = (path or "", dim)
                if ownership.roles.get(key) == "out" and key not in found:
                    found.append(key)
    return found


def _units(owners: np.ndarray, units: Mapping[int, int]) -> np.ndarray:
    return np.asarray([units.get(int(root), -1) for root in owners], np.int64)


def _layouts(ownership: Ownership, where: Mapping[int, tuple[int, int]]) -> dict[str, dict[int, np.ndarray]]:
    layouts: dict[str, dict[int, np.ndarray]] = {}
    for node in ownership.trace.nodes:
        value = ownership.values.get(node.name)
        if not isinstance(value, torch.Tensor):
            continue
        owners = canonical(value, ownership.sets)
        dims = {}
        changing = varying(owners)
        if len(changing) == 1:
            table = np.asarray(
                [where.get(int(root), (-1, 0)) for root in along(owners, changing[0])], np.int64
            )
            if (table[:, 0] >= 0).any():
                dims[changing[0]] = table
        if dims:
            layouts[node.name] = dims
    return layouts
