"""What a sub-net costs, without building it: its operations, and its time by the device's table of blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from cveff.compress.block_walk import argument, node_argument, operator, pair
from cveff.compress.blocks import macs
from cveff.compress.depth import block_ends
from cveff.compress.latency_model import LatencyModel
from cveff.compress.sizes import Sizes
from cveff.compress.trace import Trace, trace
from cveff.dynamic.elastic_space import SubNet
from cveff.dynamic.supernet import Supernet
from cveff.errors import StepError
from cveff.model import build

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _ShortTrace(Trace):
    """A trace in which some blocks hand on what they get.

    Attributes:
        graph: of the network without them; nodes keep their names.
        convolutions: (node, path of its module, padding of its whole kernel).
    """

    graph: torch.fx.Graph
    convolutions: tuple[tuple[torch.fx.Node, str, Any], ...]

    @property
    def nodes(self) -> list[torch.fx.Node]:
        """The nodes in the order they run."""
        return list(self.graph.nodes)


class SubNetCosts:
    """Costs of the sub-nets of one network, at batch 1.

    Args:
        supernet: the network is traced once at each image size that is asked for.
    """

    def __init__(self, supernet: Supernet) -> None:
        self._supernet = supernet
        self._sizes = lru_cache(None)(self._make_sizes)
        self._short = lru_cache(256)(self._make_short)

    def macs(self, subnet: SubNet) -> int:
        """Multiply-accumulate operations."""
        return macs(*self._traced(subnet))

    def milliseconds(self, subnet: SubNet, predictor: LatencyModel) -> float:
        """Predicted time of a call."""
        return predictor.predict(*self._traced(subnet))

    def _traced(self, subnet: SubNet) -> tuple[Trace, Shapes]:
        sizes = self._sizes(subnet.size)
        shapes = sizes.shapes({**sizes.full, **dict(subnet.widths)})
        found = self._short(subnet.size, subnet.dropped)
        _shrink(found, shapes, self._supernet.space.kernels, dict(subnet.kernels))
        return found, shapes

    def _make_sizes(self, size: tuple[int, int]) -> Sizes:
        """Shapes at an image size: the same graph, so what lies along which dimension is known."""
        analysis, spec = self._supernet.analysis, self._supernet.at_size(size)
        if size == self._supernet.spec.input.size:
            return Sizes(analysis)
        found = trace(build(spec).module, spec.input)
        if [node.name for node in found.nodes] != [node.name for node in analysis.trace.nodes]:
            raise StepError(
                f"{spec.architecture} is another graph at {size[0]}×{size[1]} than at its own size, so its costs "
                "cannot be predicted; leave that resolution out"
            )
        return Sizes(replace(analysis, trace=found))

    def _make_short(self, size: tuple[int, int], dropped: tuple[str, ...]) -> _ShortTrace:
        whole = self._sizes(size).analysis.trace
        graph = copy.deepcopy(whole.program.graph)
        nodes = {node.name: node for node in graph.nodes}
        order = {node: index for index, node in enumerate(graph.nodes)}
        ends = []
        for path in dropped:
            found = block_ends(whole, path)
            if found is None:
                raise StepError(f"{path} is no residual block of this network; train it again")
            ends.append((nodes[found[0].name], nodes[found[1].name]))
        # From the last to the first: what a block gets may come out of another one that goes.
        for first, last in sorted(ends, key=lambda pair: order[pair[1]], reverse=True):
            last.replace_all_uses_with(first)
        for node in reversed(list(graph.nodes)):
            inside = any((whole.modules.get(node.name, "") + ".").startswith(f"{path}.") for path in dropped)
            if inside and node.op == "call_function" and not node.users:
                graph.erase_node(node)
        fields = {name: getattr(whole, name) for name in Trace.__dataclass_fields__}
        weights = {name: path.removesuffix(".weight") for name, path in whole.parameters.items()}
        convolutions = tuple(
            (node, weights[weight.name], argument(node, 4, 0))
            for node in graph.nodes
            if operator(node) == "conv2d" and (weight := node_argument(node, 1)).name in weights
        )
        return _ShortTrace(**fields, graph=graph, convolutions=convolutions)


def _shrink(
    found: _ShortTrace, shapes: Shapes, own: Mapping[str, Sequence[int]], sides: Mapping[str, int]
) -> None:
    """Give convolutions of the graph, and their weights in `shapes`, smaller kernels and as much less padding."""
    for node, path, padding in found.convolutions:
        if path not in sides:
            continue
        side, weight, source = sides[path], node_argument(node, 1), node_argument(node, 0)
        less = pair(argument(node, 5, 1), 2)[0] * (own[path][0] - side)
        shapes[weight.name] = (*shapes[weight.name][:2], side, side)
        if "pad" in operator(source):
            *front, height, width = shapes[source.name]
            shapes[source.name] = (*front, height - less, width - less)
        elif not isinstance(padding, str):
            node.update_arg(4, [amount - less // 2 for amount in pair(padding, 2)])
