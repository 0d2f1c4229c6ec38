"""Which tensors are rounded, so that an engine's integer kernels take over and nothing is rounded in vain.

An engine runs an operator on integers if everything it reads is rounded and (for most) what it writes is rounded as
well. What is decided here are tensors and who reads them rounded; engines differ in what they ask for:

- "cpu" and its variants (ONNX Runtime, OpenVINO): convolutional networks stay in integers from end to end, through
  additions,
  concatenations and pooling. Networks with layer norms do not: rounding their residual stream costs accuracy and buys
  nothing, so only layers with weights are rounded, and matrix products return floats.
- "tensorrt": inputs of layers with weights and of attention's products, and one branch of each residual addition (the
  other
  is a convolution that the addition is fused into); zero points are 0, weights have a step for each output channel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import fx

from cveff.compress.quant.capture import CONVOLUTIONS, aten, constant, identify, output_axis, pads_zeros
from cveff.compress.quant.checks import check_excluded
from cveff.compress.quant.fake_quant import Grid
from cveff.errors import StepError
from cveff.target import Scheme

LINEAR = {aten.linear.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default}
CLAMPS = {aten.relu.default, aten.hardtanh.default, aten.relu6.default}
"""Activations that are nothing but the range of the rounding behind them."""
_COMBINING = {aten.add.Tensor, aten.mul.Tensor, aten.cat.default}
_POINTWISE = {aten.sigmoid.default, aten.leaky_relu.default}
_AVERAGING = {aten.avg_pool2d.default}
PASSING = {
    aten.max_pool2d.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.upsample_nearest2d.vec,
}
"""Operators that only move values: what they return has the steps of what they take."""
NORMS = {aten.layer_norm.default, aten.group_norm.default}


@dataclass(frozen=True)
class Site:
    """A tensor that is rounded.

    Attributes:
        tensor: its operator, as `identify` names it.
        readers: operators that read it rounded; none: all do.
        like: the tensor whose steps it has; "": its own.
        bits, signed, symmetric, float8: its grid.
    """

    tensor: str
    readers: tuple[str, ...] = ()
    like: str = ""
    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    float8: bool = False

    @property
    def grid(self) -> Grid:
        """The integers."""
        return Grid(self.bits, self.signed, self.symmetric, float8=self.float8)


@dataclass(frozen=True)
class WeightSite:
    """A weight that is rounded.

    Attributes:
        reader: the operator whose second argument it is.
        axis: of the output channels, each of which has its own step.
        bits: of its grid, which is signed, symmetric and without the lowest integer.
        float8: its grid is float8's.
        per_tensor: one step for all channels.
    """

    reader: str
    axis: int = 0
    bits: int = 8
    float8: bool = False
    per_tensor: bool = False

    @property
    def grid(self) -> Grid:
        """The integers."""
        return Grid(self.bits, signed=True, symmetric=True, narrow=not self.float8, float8=self.float8)


@dataclass(frozen=True)
class Placement:
    """Everything that is rounded.

    Attributes:
        sites: tensors, in the order they are computed.
        weights: the layers that run on integers.
        excluded: operators that were to stay in floats.
        scheme: whose engine it is for.
    """

    sites: tuple[Site, ...]
    weights: tuple[WeightSite, ...]
    excluded: tuple[str, ...] = ()
    scheme: Scheme = "cpu"


def place(graph: fx.GraphModule, scheme: Scheme = "cpu", exclude: Collection[str] = ()) -> Placement:
    """Decide for a captured graph.

    Args:
        exclude: operators, by `identify`'s names, that stay in floats.

    Raises:
        StepError: the scheme or an excluded name is unknown, or nothing is left to round.
    """
    if scheme not in get_args(Scheme):
        raise StepError(f"quantization scheme {scheme!r} is unknown; known: {', '.join(get_args(Scheme))}")
    check_excluded(graph, exclude)
    walk = _TensorRT if scheme == "tensorrt" else _OpenVino if scheme == "openvino" else _Cpu
    signed = scheme in ("cpu-signed", "tensorrt")
    found = replace(walk(graph, frozenset(exclude), signed=signed).placement(), scheme=scheme)
    if not found.weights:
        raise StepError("no layer with weights is left to quantize")
    return found


class _Walk:
    """What both schemes share: names, layers with weights, and the sites collected so far."""

    def __init__(self, graph: fx.GraphModule, exclude: frozenset[str], signed: bool) -> None:
        self.graph, self.signed = graph, signed
        self.names = {node: name for name, node in identify(graph).items()}
        self.computed = _computed(graph)
        self.weighted = [
            node
            for node in graph.graph.nodes
            if node.target in CONVOLUTIONS | LINEAR
            and constant(graph, node.args[1]) is not None
            and node.args[0] in self.computed
        ]
        self.excluded = {node for node, name in self.names.items() if name in exclude}
        self.integer = [node for node in self.weighted if node not in self.excluded]
        self.readers: dict[fx.Node, set[fx.Node] | None] = {}  # None: everyone
        self.like: dict[fx.Node, fx.Node] = {}

    def for_all(self, tensor: fx.Node) -> None:
        """Everyone reads `tensor` rounded."""
        if tensor in self.names:
            self.readers[tensor] = None

    def for_reader(self, tensor: fx.Node, reader: fx.Node) -> None:
        """`reader` does."""
        while pads_zeros(tensor) and len(tensor.users) == 1:
            tensor, reader = tensor.args[0], tensor  # type: ignore[assignment]
        if tensor not in self.names:
            return
        readers = self.readers.setdefault(tensor, set())
        if readers is not None:
            readers.add(reader)

    def result(self) -> Placement:
        """The sites in order."""
        sites = []
        for node in self.graph.graph.nodes:
            if node in self.readers:
                readers = self.readers[node]
                sites.append(
                    Site(
                        self.names[node],
                        () if readers is None else tuple(sorted(self.names[reader] for reader in readers)),
                        self.names[self.like[node]] if node in self.like else "",
                        signed=self.signed,
                        symmetric=self.signed,
                    )
                )
        weights = tuple(WeightSite(self.names[node], output_axis(node)) for node in self.integer)
        excluded = tuple(self.names[node] for node in self.names if node in self.excluded)
        return Placement(tuple(sites), weights, excluded)


class _Cpu(_Walk):
    products = False

    def placement(self) -> Placement:
        nodes = list(self.graph.graph.nodes)
        end_to_end = not any(node.target in NORMS for node in nodes)
        integer = set(self.integer)
        if self.products:
            integer |= {node for node in nodes if node.target in PRODUCTS} - self.excluded
        if end_to_end:
            integer |= {node for node in nodes if self._can_be_integer(node)} - self.excluded
        for node in nodes:
            if node in integer:
                for tensor in _activations(node):
                    self.for_reader(tensor, node)
        for node in nodes:
            if node in integer and node.target not in LINEAR | PRODUCTS:
                self.for_all(_behind_clamps(node))
        for node in nodes:
            source = node.args[0] if node.args else None
            if node.target in PASSING and source in self.readers and self.readers[source] is None:
                self.readers[node] = None
                self.like[node] = self.like.get(source, source)
        return self.result()

    def _can_be_integer(self, node: fx.Node) -> bool:
        if node.target not in _COMBINING | _POINTWISE | _AVERAGING:
            return False
        activations = list(_activations(node))
        first: Any = node.args[0]
        wanted = len(first) if node.target is aten.cat.default else 2 if node.target in _COMBINING else 1
        return len(activations) == wanted and all(tensor in self.names for tensor in activations)


class _OpenVino(_Cpu):
    """As `_Cpu`; products of attention too: OpenVINO has integer kernels for them."""

    products = True


class _TensorRT(_Walk):
    def placement(self) -> Placement:
        for node in self.graph.graph.nodes:
            if node in self.integer or self._is_product(node):
                for tensor in _activations(node):
                    self.for_reader(tensor, node)
            elif node.target is aten.add.Tensor and node not in self.excluded:
                skip = self._skip_of(node)
                if skip is not None:
                    self.for_reader(skip, node)
        return self.result()

    def _is_product(self, node: fx.Node) -> bool:
        """A product of two computed matrices: with one in floats, rounding the other would be in vain."""
        if node.target not in PRODUCTS or node in self.excluded:
            return False
        tensors = list(_activations(node))
        return len(tensors) == 2 and all(tensor in self.computed for tensor in tensors)

    def _skip_of(self, node: fx.Node) -> fx.Node | None:
        """The branch of an addition that is not the convolution it will be fused into."""
        tensors = list(_activations(node))
        if len(tensors) != 2 or "alpha" in node.kwargs or _shape(tensors[0]) != _shape(tensors[1]):
            return None
        fused = [
            tensor
            for tensor in tensors
            if tensor in self.integer and tensor.target in CONVOLUTIONS and len(tensor.users) == 1
        ]
        return next((tensor for tensor in tensors if tensor is not fused[0]), None) if fused else None


def _computed(graph: fx.GraphModule) -> set[fx.Node]:
    """What depends on the images: the rest (Swin V2's position biases) is constant, and folded when exported."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        is_size = node.target is aten.sym_size.int
        if node.op == "placeholder" or (not is_size and any(item in found for item in node.all_input_nodes)):
            found.add(node)
    return found


def _shape(node: fx.Node) -> torch.Size:
    value = node.meta["val"]
    return value.shape  # type: ignore[no-any-return]


def _activations(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that an operator computes with, apart from weights."""
    if node.target in CONVOLUTIONS | LINEAR:
        yield node.args[0]  # type: ignore[misc]
        return
    given: Any = node.args[0] if node.target is aten.cat.default else node.args[:2]
    for argument in given:
        if isinstance(argument, fx.Node) and argument.op != "get_attr" and _is_float(argument):
            yield argument


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _behind_clamps(node: fx.Node) -> fx.Node:
    """The last of the clamps that alone read one another, or `node`."""
    while len(node.users) == 1 and next(iter(node.users)).target in CLAMPS:
        node = next(iter(node.users))
    return node
