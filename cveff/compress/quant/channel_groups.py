"""Channels of a captured graph that can be rescaled together: made by layers, read by layers, nothing else in between.

Whatever passes a factor on channel by channel joins tensors into one group: ReLU, pooling, additions of a residual
stream, multiplication by a gate. A group that something else touches (a sigmoid, a concatenation, the images, the
output) is left. So is one with a clamp (ReLU6): channels that stay below it on a few hundred images do not on all
others. On EfficientNet-Lite0 taking them along, stretched four times at most, changed held-out logits by 5% of their
energy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from cveff.compress.quant.capture import aten, constant, pads_zeros
from cveff.compress.quant.layers import Layer, find_layers

_PASSING = {
    aten.relu.default,
    aten.leaky_relu.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.vec,
    aten.add.Tensor,
    aten.sub.Tensor,
}
_GATES = {aten.sigmoid.default, aten.hardsigmoid.default}


@dataclass(frozen=True)
class ChannelGroup:
    """Tensors whose channels have one factor.

    Attributes:
        tensors: operators of the graph.
        axis: of the channels: 1, or -1 behind linear layers.
        readers: every layer that reads one of them.
        divided: paths of the parameters whose first axis is the channels, and that are divided.
        is_norm: layer norms make them, not layers with weights.
    """

    tensors: tuple[fx.Node, ...]
    axis: int
    readers: tuple[Layer, ...]
    divided: tuple[str, ...]
    is_norm: bool = False


def channel_groups(graph: fx.GraphModule) -> list[ChannelGroup]:
    """Every group of a captured graph, without roundings, that can be rescaled, in order."""
    return _Groups(graph).found()


class _Groups:
    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.layers = {layer.node: layer for layer in find_layers(graph)}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.broken: set[fx.Node] = set()
        self.divided: dict[fx.Node, list[str]] = {}
        self.readers: dict[fx.Node, list[Layer]] = {}
        self.axes: dict[fx.Node, set[int]] = {}
        for node in graph.graph.nodes:
            self._visit(node)

    def found(self) -> list[ChannelGroup]:
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.parent:
            members.setdefault(self._root(node), []).append(node)
        broken = {self._root(node) for node in self.broken if node in self.parent}
        result = []
        for root, nodes in members.items():
            readers = [layer for node in nodes for layer in self.readers.get(node, ())]
            divided = [path for node in nodes for path in self.divided.get(node, ())]
            axes = {axis for node in nodes for axis in self.axes.get(node, ())}
            if root in broken or not readers or not divided or len(axes) != 1:
                continue
            is_norm = all(node.target is aten.layer_norm.default for node in nodes if node in self.divided)
            result.append(ChannelGroup(tuple(nodes), axes.pop(), tuple(readers), tuple(divided), is_norm))
        return result

    def _visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "output"):
            for tensor in (node, *node.all_input_nodes):
                self._break(tensor)
            return
        if node.op != "call_function":
            return
        target = node.target
        if node in self.layers:
            self._layer(node, self.layers[node])
        elif target is aten.layer_norm.default:
            self._norm(node)
        elif target is aten.mul.Tensor and self._gated(node) is not None:
            scaled, gate = self._gated(node)  # type: ignore[misc]
            self._join(node, scaled)
            self._break(gate)
        elif target is aten.mean.dim and _is_spatial(node):
            self._join(node, node.args[0])
        elif pads_zeros(node) or target in _PASSING:
            tensors = [item for item in node.args if isinstance(item, fx.Node)]
            plain = all(
                item.op == "call_function" and _shape(item)[1:2] == _shape(node)[1:2] for item in tensors
            )
            numbers = target in (aten.add.Tensor, aten.sub.Tensor) and len(tensors) < 2
            for tensor in tensors if plain and not numbers else (node, *node.all_input_nodes):
                if plain and not numbers:
                    self._join(node, tensor)
                else:
                    self._break(tensor)
        elif target in (aten.flatten.using_ints, aten.view.default, aten.reshape.default) and _drops_ones(
            node
        ):
            self._join(node, node.args[0])
        else:
            for tensor in (node, *node.all_input_nodes):
                self._break(tensor)

    def _layer(self, node: fx.Node, layer: Layer) -> None:
        source: Any = node.args[0]
        self.readers.setdefault(source, []).append(layer)
        is_linear = layer.kernel is None
        for tensor in (source, node):
            self.parent.setdefault(tensor, tensor)
            self.axes.setdefault(tensor, set()).add(-1 if is_linear else 1)
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, fx.Node) and not layer.bias:
            self._break(node)
        weight: Any = node.args[1]
        if len(weight.users) != 1 or (isinstance(bias, fx.Node) and len(bias.users) != 1):
            self._break(node)
        self.divided[node] = [path for path in (layer.weight, layer.bias) if path]

    def _norm(self, node: fx.Node) -> None:
        self._break(node.args[0])
        affine = node.args[2:4]
        values = [constant(self.graph, item) for item in affine if item is not None]
        own = all(isinstance(item, fx.Node) and len(item.users) == 1 for item in affine if item is not None)
        if (
            not values
            or affine[0] is None
            or not own
            or any(value is None or value.ndim != 1 for value in values)
        ):
            self._break(node)
            return
        self.parent.setdefault(node, node)
        self.axes.setdefault(node, set()).add(-1)
        self.divided[node] = [str(item.target) for item in affine if isinstance(item, fx.Node)]

    def _gated(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """What is multiplied and its gate; not x · sigmoid(x)."""
        tensors = [item for item in node.args if isinstance(item, fx.Node)]
        if len(tensors) != 2 or any(item.op != "call_function" for item in tensors):
            return None
        gates = [item for item in tensors if item.target in _GATES]
        if len(gates) != 1:
            return None
        scaled = tensors[0] if tensors[1] is gates[0] else tensors[1]
        return None if gates[0].args[0] is scaled else (scaled, gates[0])

    def _join(self, node: fx.Node, other: Any) -> None:
        a, b = self._root(node), self._root(other)
        if a is not b:
            self.parent[a] = b

    def _break(self, node: Any) -> None:
        if isinstance(node, fx.Node):
            self.parent.setdefault(node, node)
            self.broken.add(node)

    def _root(self, node: fx.Node) -> fx.Node:
        self.parent.setdefault(node, node)
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _is_spatial(node: fx.Node) -> bool:
    """A mean over rows and columns that keeps channels where they are."""
    rank = len(_shape(node.args[0]))  # type: ignore[arg-type]
    axes: Any = node.args[1]
    return rank == 4 and sorted(axis % 4 for axis in axes) == [2, 3]


def _drops_ones(node: fx.Node) -> bool:
    """(N, C, 1, 1) -> (N, C)."""
    before, after = _shape(node.args[0]), _shape(node)  # type: ignore[arg-type]
    return len(before) == 4 and before[2:] == (1, 1) and len(after) == 2 and after[1] == before[1]
