"""Layers of a network that are left in floats, or rounded, together.

Where integers stay integers from layer to layer, these are stretches of the network: leaving a layer in the middle of
one in floats costs two conversions. Where every layer is an island between floats (networks with layer norms), they are
layers of the same role: all `mlp.fc1` of the first blocks, say.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx

from cveff.compress.quant.capture import identify
from cveff.compress.quant.placement import NORMS

MOST = 8
"""Segments a network is cut into at most: each is exported and timed once."""


@dataclass(frozen=True)
class Segment:
    """Some operators of a network.

    Attributes:
        name: the module they belong to, or the first and the last of several.
        operators: their names, as `identify` gives them, in order.
        layers: those of them that have weights.
    """

    name: str
    operators: tuple[str, ...]
    layers: tuple[str, ...]


def segments(graph: fx.GraphModule, layers: Collection[str], most: int = MOST) -> list[Segment]:
    """Cut a captured graph; the segment with most layers is cut on while there is room.

    Args:
        layers: the operators with weights that may run on integers.

    Returns:
        at most `most` segments, of stretches together every operator; of roles more, if there are more.
    """
    nodes = {name: node for name, node in identify(graph).items() if name != "input"}
    layers = frozenset(layers)
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    names = sorted(nodes, key=lambda name: order[nodes[name]])
    islands = any(node.target in NORMS for node in nodes.values())
    found = _roles([name for name in names if name in layers]) if islands else [names]
    while len(found) < most:
        for index in sorted(range(len(found)), key=lambda index: -_count(found[index], layers)):
            group = found[index]
            halves = (
                [group[: len(group) // 2], group[len(group) // 2 :]] if islands else _halves(group, layers)
            )
            halves = [half for half in halves if half]
            if len(halves) > 1:
                found[index : index + 1] = halves
                break
        else:
            break
    return [_named(group, layers, islands) for group in found]


def _roles(names: Sequence[str]) -> list[list[str]]:
    """Layers whose modules' paths differ in numbers alone."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name.partition(":")[0]), []).append(name)
    return list(found.values())


def _halves(group: list[str], layers: Collection[str]) -> list[list[str]]:
    """`group` in two where one module ends, about as many layers in each; at the outermost modules that are several."""
    for depth in range(1, max(len(_path(name)) for name in group) + 1):
        runs = _runs(group, depth, layers)
        if len(runs) > 1:
            counts = [_count(run, layers) for run in runs]
            cut = min(range(1, len(runs)), key=lambda index: abs(sum(counts[:index]) - sum(counts[index:])))
            return [[name for run in half for name in run] for half in (runs[:cut], runs[cut:])]
    return [group]


def _runs(group: list[str], depth: int, layers: Collection[str]) -> list[list[str]]:
    """Runs of operators whose modules share the first `depth` names; what comes before the next layer stays behind the
    last."""
    runs: list[list[str]] = [[]]
    prefix: tuple[str, ...] | None = None
    for name in group:
        if name in layers:
            own = _path(name)[:depth]
            if prefix is not None and own != prefix:
                runs.append([])
            prefix = own
        runs[-1].append(name)
    return runs


def _count(group: Sequence[str], layers: Collection[str]) -> int:
    return sum(name in layers for name in group)


def _path(name: str) -> tuple[str, ...]:
    path = name.partition(":")[0]
    return tuple(path.split(".")) if path else ()


def _named(group: list[str], layers: Collection[str], whole: bool) -> Segment:
    own = [name for name in group if name in layers] or group
    first, last = _path(own[0]), _path(own[-1])
    same = max(len(first), len(last)) if whole or first == last else 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    ends = [".".join(path[: same + 1]) for path in (first, last)]
    name = ends[0] if first == last else " … ".join(ends)
    return Segment(name or own[0], tuple(group), tuple(name for name in group if name in layers))
