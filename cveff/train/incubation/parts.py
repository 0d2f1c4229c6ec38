"""A network as K modules in a row, each with a meta layer that can stand in for it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from cveff.compress.depth import removable_blocks
from cveff.compress.drop_blocks import DropBlocks
from cveff.compress.trace import Trace, trace
from cveff.errors import StepError
from cveff.runtime.input_spec import InputSpec


@dataclass(frozen=True)
class Part:
    """One of the modules that a network is divided into.

    Attributes:
        blocks: paths of its blocks, in the order they run.
        surplus: those of them that its meta layer does without.
        tensors: names in the state dict of all that belongs to it: its blocks and what stands between them; the
            first part also has the stem, the last one the head.
        layers: paths of the modules outside its blocks that belong to it.
    """

    blocks: tuple[str, ...]
    surplus: tuple[str, ...]
    tensors: frozenset[str]
    layers: tuple[str, ...]

    def is_in_blocks(self, name: str) -> bool:
        """Whether a tensor belongs to one of the blocks."""
        return name.startswith(tuple(f"{block}." for block in self.blocks))


def divide(module: nn.Module, spec: InputSpec, count: int) -> tuple[Part, ...]:
    """Divide a network into `count` parts of as many blocks each, give or take one.

    Blocks are the residual blocks that can be taken out (see `removable_blocks`) and their siblings of the same class,
    which change resolution or width. A part's meta layer is its blocks of the second sort, which nothing can do
    without, or else its first block.

    Raises:
        StepError: the network has fewer blocks.
    """
    found = trace(module, spec)
    order = _order(found)
    removable = removable_blocks(module, found)
    blocks = _blocks(module, removable, order)
    if not 1 <= count <= len(blocks):
        raise StepError(
            f"{type(module).__name__} has {len(blocks)} blocks, which cannot be {count} modules; "
            f"give a number from 1 to {len(blocks)}"
        )
    groups = [
        tuple(blocks[index] for index in part) for part in np.array_split(np.arange(len(blocks)), count)
    ]
    cuts = [_last(order, group[-1]) for group in groups[:-1]]
    owners = _owners(module, found, cuts, groups)
    layers = _layers(module, owners, blocks)
    return tuple(
        Part(
            blocks=group,
            surplus=_surplus(group, removable),
            tensors=frozenset(name for name, owner in owners.items() if owner == index),
            layers=tuple(path for path, owner in layers.items() if owner == index),
        )
        for index, group in enumerate(groups)
    )


def reduced(parts: Sequence[Part], whole: int | None) -> DropBlocks:
    """The edit that puts the meta layer in each part's place, but for part `whole`."""
    return DropBlocks(
        tuple(path for index, part in enumerate(parts) if index != whole for path in part.surplus)
    )


def _order(found: Trace) -> dict[str, list[int]]:
    """Path of a module -> where in the graph it, or something in it, runs."""
    order: dict[str, list[int]] = {}
    for index, node in enumerate(found.nodes):
        path = found.modules[node.name] if node.op == "call_function" else ""
        while path:
            order.setdefault(path, []).append(index)
            path = path.rpartition(".")[0]
    return order


def _last(order: dict[str, list[int]], path: str) -> int:
    return order[path][-1]


def _blocks(module: nn.Module, removable: Sequence[str], order: dict[str, list[int]]) -> list[str]:
    classes: dict[str, set[type]] = {}
    for path in removable:
        classes.setdefault(path.rpartition(".")[0], set()).add(type(module.get_submodule(path)))
    found = [
        f"{parent}.{name}" if parent else name
        for parent, kinds in classes.items()
        for name, child in module.get_submodule(parent).named_children()
        if type(child) in kinds
    ]
    return sorted((path for path in found if path in order), key=lambda path: order[path][0])


def _surplus(blocks: Sequence[str], removable: Sequence[str]) -> tuple[str, ...]:
    may_go = [path for path in blocks if path in removable]
    return tuple(may_go if len(may_go) < len(blocks) else may_go[1:])


def _owners(
    module: nn.Module, found: Trace, cuts: Sequence[int], groups: Sequence[tuple[str, ...]]
) -> dict[str, int]:
    """Name in the state dict -> the part that uses it first."""
    position = {node.name: index for index, node in enumerate(found.nodes)}
    first = {
        found.parameters[node.name]: min(position[user.name] for user in node.users)
        for node in found.nodes
        if node.name in found.parameters and node.users
    }
    used = {name: bisect_left(cuts, index) for name, index in first.items()}
    by_module = {name.rpartition(".")[0]: owner for name, owner in used.items()}
    owners: dict[str, int] = {}
    owner = 0
    for name in module.state_dict():
        block = [
            index
            for index, group in enumerate(groups)
            if name.startswith(tuple(f"{path}." for path in group))
        ]
        # What is used nowhere, or is no float, goes with its block, its module, or what comes before it.
        owner = block[0] if block else used.get(name, by_module.get(name.rpartition(".")[0], owner))
        owners[name] = owner
    return owners


def _layers(module: nn.Module, owners: dict[str, int], blocks: Sequence[str]) -> dict[str, int]:
    """Path of a module without children, outside blocks -> the part of its tensors, or of the module before it."""
    inside = tuple(f"{path}." for path in blocks)
    found: dict[str, int] = {}
    owner = 0
    for path, layer in module.named_modules():
        if not path or any(True for _ in layer.children()) or f"{path}.".startswith(inside):
            continue
        own = [owners[f"{path}.{name}"] for name in layer.state_dict()]
        owner = own[0] if own else owner
        found[path] = owner
    return found
