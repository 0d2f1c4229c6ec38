"""Groups of channels that can be pruned, and what pruning them does to every weight, shape and attribute.

Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023) names the problem; the analysis is ours (see
`ownership.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from cveff.compress.held_sizes import held_sizes
from cveff.compress.layout import stays
from cveff.compress.own_calls import Corrections, OwnCalls
from cveff.compress.owners import along, canonical, varying
from cveff.compress.ownership import Ownership, Role
from cveff.compress.prune_channels import PruneChannels
from cveff.compress.trace import Trace
from cveff.compress.union_find import NONE
from cveff.errors import StepError


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
class Analysis:
    """A network's groups, and where their units lie along every parameter and every value of the graph.

    A layout is an int64 array (size, 2): the (group index, unit) of every index along a dimension; group -1 for
    what belongs to no group that may be pruned.

    Attributes:
        groups: what may be pruned.
        frozen: what may not, with the reason.
        parameters: path -> dimension -> layout, for parameters and buffers.
        values: node name -> dimension -> layout.
        normalizers: names of nodes that take statistics over channels: over those that stay, once some are gone.
        grouped: path of a grouped convolution's weight -> number of groups, where its groups are units.
        norm_groups: node name -> number of groups of a group norm.
        own_calls: which node a module's own call became; None before any network ran.
        flexible: calls that name sizes which pruning changes.
        unrelated: (module path, attribute) pairs that only happen to hold the size of something that shrinks.
    """

    trace: Trace
    groups: tuple[Group, ...]
    frozen: tuple[Group, ...]
    parameters: Mapping[str, Mapping[int, np.ndarray]]
    values: Mapping[str, Mapping[int, np.ndarray]]
    normalizers: frozenset[str]
    grouped: Mapping[str, int]
    norm_groups: Mapping[str, int]
    own_calls: OwnCalls | None = None
    flexible: Corrections = field(default_factory=dict)
    unrelated: frozenset[tuple[str, str]] = frozenset()

    def masks(self, keep: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """One bool array a group, in order; groups that `keep` does not name stay whole.

        Raises:
            StepError: `keep` names an unknown group, has a wrong length, or leaves nothing of a group.
        """
        sizes = {group.name: group.size for group in self.groups}
        for name, mask in keep.items():
            if name not in sizes:
                raise StepError(
                    f"no group of channels is called {name!r}; known: {', '.join(list(sizes)[:5])}, …"
                )
            if len(mask) != sizes[name]:
                raise StepError(f"{name} has {sizes[name]} units and the mask {len(mask)}")
            if not np.any(mask):
                raise StepError(
                    f"nothing of {name} would be left; keep at least one of its {sizes[name]} units"
                )
        return [np.asarray(keep.get(group.name, np.ones(group.size)), bool) for group in self.groups]

    def shapes(self, keep: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
        """Shape of every value and parameter node once only the units of `keep` are left.

        Args:
            keep: group name -> bool (size,); groups that are not named stay whole.
        """
        masks = self.masks(keep)
        shapes = dict(self.trace.shapes)
        layouts = {
            **self.values,
            **{
                name: self.parameters[path]
                for name, path in self.trace.parameters.items()
                if path in self.parameters
            },
        }
        for name, dims in layouts.items():
            shape = list(shapes[name])
            for dim, layout in dims.items():
                shape[dim] = int(stays(layout, masks).sum())
            shapes[name] = tuple(shape)
        return shapes

    def edit(self, keep: Mapping[str, np.ndarray], module: nn.Module) -> PruneChannels:
        """The edit that leaves only the units of `keep`.

        Args:
            module: the network; only read, for the sizes its code holds.
        """
        masks = self.masks(keep)
        slices: dict[str, dict[str, list[int]]] = {}
        for path, dims in self.parameters.items():
            for dim, layout in dims.items():
                staying = stays(layout, masks)
                if not staying.all():
                    slices.setdefault(path, {})[str(dim)] = np.flatnonzero(staying).tolist()
        calls = self.own_calls.corrections(self.flexible, self.shapes(keep)) if self.own_calls else {}
        return PruneChannels(slices, held_sizes(self, masks, module), calls)


def find_groups(ownership: Ownership, refused: Mapping[str, str] | None = None) -> Analysis:
    """Collect owners into groups: sets with a share in the same dimensions are interchangeable.

    Args:
        refused: name of a group -> why it may not be pruned.
    """
    sets, refused = ownership.sets, refused or {}
    slices = _slices(ownership)
    places: dict[int, list[tuple[str, int]]] = defaultdict(list)  # root -> the dimensions it has a share in
    for key, owners in slices.items():
        for root in np.unique(owners):
            if root != NONE:
                places[int(root)].append(key)
    makers = {key: index for index, key in enumerate(_makers(ownership))}
    families: dict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
    for root in sorted(places):
        if any(key in makers for key in places[root]):
            families[tuple(sorted(places[root]))].append(root)
    groups: list[Group] = []
    frozen: list[Group] = []
    where: dict[int, tuple[int, int]] = {}
    names: dict[str, int] = defaultdict(int)
    for keys, roots in sorted(
        families.items(), key=lambda item: min(makers.get(key, 10**9) for key in item[0])
    ):
        first = min((key for key in keys if key in makers), key=makers.__getitem__)
        base = first[0].rpartition(".")[0] or first[0]
        reasons = sets.reason(np.asarray(roots))
        for code in sorted(set(reasons.tolist())):
            chosen = [root for root, reason in zip(roots, reasons, strict=True) if reason == code]
            name = f"{base}#{names[base]}" if names[base] else base
            names[base] += 1
            reason = sets.reasons[code] or refused.get(name, "")
            if len(chosen) == 1 and not reason:
                reason = "all of it lives and dies as one"
            units = {root: unit for unit, root in enumerate(chosen)}
            members = tuple(
                Member(path, dim, ownership.roles[(path, dim)], _units(slices[(path, dim)], units))
                for path, dim in keys
            )
            group = Group(name, len(chosen), members, reason)
            if reason:
                frozen.append(group)
            else:
                where |= {root: (len(groups), unit) for root, unit in units.items()}
                groups.append(group)
    parameters: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for (path, dim), owners in slices.items():
        layout = _layout(owners, where)
        if layout is not None:
            parameters[path][dim] = layout
    return Analysis(
        trace=ownership.trace,
        groups=tuple(groups),
        frozen=tuple(frozen),
        parameters=dict(parameters),
        values=_value_layouts(ownership, where),
        normalizers=frozenset(ownership.normalizers),
        grouped=dict(ownership.grouped.values()),
        norm_groups=dict(ownership.norm_groups),
    )


def _slices(ownership: Ownership) -> dict[tuple[str, int], np.ndarray]:
    """(path, dim) -> canonical owners along it, for every parameter that has any."""
    sets = ownership.sets
    found = {key: sets.find(owners) for key, owners in ownership.weights.items() if (owners != NONE).any()}
    for path, table in ownership.tables.items():
        owners = canonical(table, sets)
        changing = varying(owners) or _single(owners)
        if len(changing) == 1:
            found[(path, changing[0])] = along(owners, changing[0])
            ownership.roles.setdefault((path, changing[0]), "scale")
    return found


def _single(owners: torch.Tensor) -> list[int]:
    """The one dimension above size 1, where there is one, of a table that belongs to one unit as a whole."""
    wide = [dim for dim in range(owners.ndim) if owners.shape[dim] > 1]
    return wide if len(wide) == 1 else []


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


def _layout(owners: np.ndarray, where: Mapping[int, tuple[int, int]]) -> np.ndarray | None:
    table = np.asarray([where.get(int(root), (-1, 0)) for root in owners], np.int64)
    return table if (table[:, 0] >= 0).any() else None


def _value_layouts(
    ownership: Ownership, where: Mapping[int, tuple[int, int]]
) -> dict[str, dict[int, np.ndarray]]:
    layouts: dict[str, dict[int, np.ndarray]] = {}
    for node in ownership.trace.nodes:
        value = ownership.values.get(node.name)
        if not isinstance(value, torch.Tensor):
            continue
        owners = canonical(value, ownership.sets)
        changing = varying(owners)
        if len(changing) == 1:
            layout = _layout(along(owners, changing[0]), where)
            if layout is not None:
                layouts[node.name] = {changing[0]: layout}
    return layouts
