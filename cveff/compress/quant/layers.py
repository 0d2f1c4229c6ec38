"""Layers with weights in a captured graph: their weight as one matrix a group, and what reaches it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cveff.compress.quant.capture import CONVOLUTIONS, aten, constant, identify, pads_zeros
from cveff.compress.quant.fake_quant import FakeQuantize

POSITIONS = 64
"""Output positions an image contributes to a convolution's statistics, drawn at random."""


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    Attributes:
        name: of its operator, as `identify` gives it.
        node: the operator.
        weight: path of the weight; `bias`: of the bias, "" where there is none.
        groups: of a convolution; 1 for a linear layer.
        kernel, stride, padding, dilation: of a convolution in two dimensions, None for a linear layer.
    """

    name: str
    node: fx.Node
    weight: str
    bias: str
    groups: int = 1
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def matrix(self, graph: fx.GraphModule) -> Tensor:
        """(groups, outputs, inputs) float64 copy of the weight."""
        value = parameter(graph, self.weight).detach().double()
        return value.reshape(self.groups, value.shape[0] // self.groups, -1)

    def put(self, graph: fx.GraphModule, matrix: Tensor) -> None:
        """Replace the weight by one given as `matrix` returns it."""
        weight = parameter(graph, self.weight)
        with torch.no_grad():
            weight.copy_(matrix.reshape(weight.shape).to(weight.dtype))

    def rows(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(groups, samples, inputs): what the weight's rows are multiplied with, for inputs `x` of the operator."""
        if self.kernel is None:
            flat = x.reshape(-1, x.shape[-1])
            most = POSITIONS * len(x)
            if len(flat) > most:
                flat = flat[torch.randperm(len(flat), generator=generator)[:most]]
            return flat[None]
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        x = nn.functional.pad(x, self.padding)
        height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
        width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
        where = torch.randperm(height * width, generator=generator)[:POSITIONS]
        rows = (where // width * sh)[:, None, None] + (torch.arange(kh) * dh)[None, :, None]
        columns = (where % width * sw)[:, None, None] + (torch.arange(kw) * dw)[None, None, :]
        patches = x[:, :, rows, columns]  # (N, C, P, kh, kw)
        patches = patches.reshape(len(x), self.groups, -1, len(where), kh * kw)  # (N, G, C/G, P, kh*kw)
        return patches.permute(1, 0, 3, 2, 4).reshape(self.groups, len(x) * len(where), -1)


def find_layers(graph: fx.GraphModule) -> list[Layer]:
    """Every linear layer and two-dimensional convolution with a weight of its own, in order."""
    names = {node: name for name, node in identify(graph).items()}
    found = []
    for node in graph.graph.nodes:
        weight = _source(node.args[1]) if len(node.args) > 1 else None
        if node.target not in CONVOLUTIONS | {aten.linear.default} or constant(graph, weight) is None:
            continue
        assert weight is not None
        if len(weight.users) != 1 or node.target is aten.conv_transpose2d.input:
            continue
        bias = _source(node.args[2]) if len(node.args) > 2 else None
        path = str(bias.target) if bias is not None and constant(graph, bias) is not None else ""
        if node.target is aten.linear.default:
            found.append(Layer(names[node], node, str(weight.target), path))
        elif constant(graph, weight).ndim == 4:  # type: ignore[union-attr]
            found.append(_convolution(graph, node, names[node], weight, path))
    return found


def parameter(graph: fx.GraphModule, path: str) -> Tensor:
    """The parameter or buffer at `path`."""
    owner, _, name = path.rpartition(".")
    value = getattr(graph.get_submodule(owner), name)
    assert isinstance(value, Tensor)
    return value


def shift_bias(graph: fx.GraphModule, layer: Layer, shift: Tensor) -> None:
    """Add `shift`, (outputs,), to the bias of a layer that has one."""
    bias = parameter(graph, layer.bias)
    with torch.no_grad():
        bias.add_(shift.to(bias.dtype))


class Observe(fx.Interpreter):
    """Runs a graph and shows the inputs (and outputs) of chosen operators.

    Args:
        look: called with the operator, its first argument's value and its own.
    """

    def __init__(
        self, graph: fx.GraphModule, nodes: Iterable[fx.Node], look: Callable[[fx.Node, Tensor, Tensor], None]
    ) -> None:
        super().__init__(graph)
        self._chosen, self._look = set(nodes), look

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator."""
        result = super().run_node(n)
        if n in self._chosen:
            self._look(n, self.env[n.args[0]], result)  # type: ignore[index]
        return result


@torch.no_grad()
def observe(
    graph: fx.GraphModule,
    layers: Sequence[Layer],
    batches: Sequence[Tensor],
    look: Callable[[Layer, Tensor, Tensor], None],
) -> None:
    """Show every layer's input and output on every batch of images."""
    by_node = {layer.node: layer for layer in layers}
    interpreter = Observe(graph, by_node, lambda node, x, y: look(by_node[node], x, y))
    for images in batches:
        interpreter.run(images)


def _source(node: Any) -> fx.Node | None:
    """The constant behind a rounded weight or bias."""
    while isinstance(node, fx.Node) and node.op == "call_module":
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _convolution(graph: fx.GraphModule, node: fx.Node, name: str, weight: fx.Node, bias: str) -> Layer:
    value = constant(graph, weight)
    assert value is not None
    arguments: list[Any] = [*node.args, *[None] * 7][:7]
    stride, padding, dilation = (
        _pair(arguments[index], default) for index, default in ((3, 1), (4, 0), (5, 1))
    )
    kernel = (value.shape[2], value.shape[3])
    if isinstance(arguments[4], str):
        padding = (0, 0)
        if arguments[4] == "same":
            total = [dilation[side] * (kernel[side] - 1) for side in (0, 1)]
            sides = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
            return Layer(
                name, node, str(weight.target), bias, arguments[6] or 1, kernel, stride, sides, dilation
            )
    sides = (padding[1], padding[1], padding[0], padding[0])
    return Layer(name, node, str(weight.target), bias, arguments[6] or 1, kernel, stride, sides, dilation)


def _pair(value: Any, default: int) -> tuple[int, int]:
    if value is None:
        return (default, default)
    if isinstance(value, str):
        return (0, 0)
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return (int(items[0]), int(items[-1]))


def weight_rounding(graph: fx.GraphModule, layer: Layer) -> FakeQuantize | None:
    """What rounds a layer's weight, if anything does."""
    node: Any = layer.node.args[1]
    if isinstance(node, fx.Node) and node.op == "call_module":
        rounding = graph.get_submodule(str(node.target))
        return rounding if isinstance(rounding, FakeQuantize) else None
    return None


def input_rounding(graph: fx.GraphModule, layer: Layer) -> FakeQuantize | None:
    """What rounds a layer's input, if anything does; zeros may be put around it in between."""
    node: Any = layer.node.args[0]
    while isinstance(node, fx.Node) and pads_zeros(node):
        node = node.args[0]
    if isinstance(node, fx.Node) and node.op == "call_module":
        rounding = graph.get_submodule(str(node.target))
        return rounding if isinstance(rounding, FakeQuantize) else None
    return None
