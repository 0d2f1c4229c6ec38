"""Which operators compute in 16 bits, which in 32, and which go along with their neighbours.

16 bits: products, whose sums engines accumulate in 32 bits. 32 bits: softmax, norms, sums and means, pooling that
averages, powers, exponentials, and everything unknown. The rest (activation functions, additions, operators that move
values) costs no accuracy worth a conversion: it computes in whatever leaves the fewest bytes to move (`half_types`).
The split is that of mixed-precision training (Micikevicius et al., ICLR 2018, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import fx

from cveff.compress.quant.capture import aten, operator_name

Kind = Literal["half", "float", "either"]

_POINTWISE = """
abs add addcmul clamp clamp_max clamp_min div elu gelu hardsigmoid hardswish hardtanh leaky_relu maximum
minimum mish mul neg prelu relu relu6 sigmoid silu sub tanh where max_pool2d upsample_nearest2d
"""
POINTWISE = frozenset(_POINTWISE.split())
_MOVING = """
cat chunk constant_pad_nd expand expand_as flatten flip gather getitem im2col index index_select pad permute
pixel_shuffle pixel_unshuffle repeat reshape reshape_as roll select slice split split_with_sizes squeeze stack
t transpose unbind unflatten unfold unsqueeze view
"""
MOVING = frozenset(_MOVING.split())
SHAPE_ONLY = {"expand_as": 1, "reshape_as": 1, "view_as": 1}
"""Operators that read an argument for its shape alone, and where it is."""


def _in_float32(operator: Any) -> Callable[..., Any]:
    """`operator` on float16, fast on a CPU: the kernels for it there are 40 times slower than float32's (measured).

    A product of two float16 values is exact in float32, where GPUs add them up too; the sum is rounded once.
    """

    def call(*args: Any) -> Any:
        first = args[0]
        if first.dtype is not torch.float16 or first.device.type != "cpu" or torch.compiler.is_exporting():
            return operator(*args)
        widened = [item.float() if isinstance(item, torch.Tensor) else item for item in args]
        return operator(*widened).to(torch.float16)

    call.__name__ = call.__qualname__ = (
        operator.overloadpacket.__name__
    )  # so that `identify` calls it the same
    return call


COMPUTE = {
    operator: _in_float32(operator)
    for operator in (
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv_transpose2d.input,
        aten.linear.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.addmm.default,
    )
}
"""Products -> what computes them in a network in 16 bits."""


def kind_of(node: fx.Node) -> Kind:
    """What an operator on floats computes in, values aside."""
    if node.target in COMPUTE:
        return "half"
    asks = (*node.args, *node.kwargs.values())
    if any(isinstance(item, torch.dtype) and item.is_floating_point for item in asks):
        return "float"
    return "either" if operator_name(node) in POINTWISE | MOVING else "float"


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The float tensors that an operator computes with, each once."""
    ignored = SHAPE_ONLY.get(operator_name(node)) if node.op == "call_function" else None
    shape = node.args[ignored] if ignored is not None else None
    return [item for item in node.all_input_nodes if item is not shape and is_float(item)]


def is_float(node: fx.Node) -> bool:
    """Whether a node gives a tensor of floats, or several."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def reads_any_type(node: fx.Node) -> bool:
    """Whether a node is a rounding: what it reads and what it writes may each be of either type."""
    return node.op == "call_module"


def tidy(graph: fx.GraphModule) -> None:
    """Drop conversions to the float32 that everything is, in place, and write batch norms that no convolution took in
    as one multiplication and one addition: their variances do not fit into 16 bits. A constant gets one node."""
    stored: dict[str, fx.Node] = {}
    for node in list(graph.graph.nodes):
        name = operator_name(node) if node.op == "call_function" else ""
        if node.op == "get_attr" and stored.setdefault(str(node.target), node) is not node:
            node.replace_all_uses_with(stored[str(node.target)])
            graph.graph.erase_node(node)
        elif name == "_assert_tensor_metadata":
            graph.graph.erase_node(node)
        elif name in ("to", "_to_copy", "type_as") and is_float(node.args[0]) and _stays(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is aten.batch_norm.default:
            _split_batch_norm(graph, node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    called = tuple(f"{node.target}." for node in graph.graph.nodes if node.op == "call_module")
    for path in {*dict(graph.named_parameters()), *dict(graph.named_buffers())} - read:
        if path.startswith(called):
            continue
        owner, _, name = path.rpartition(".")
        delattr(graph.get_submodule(owner), name)
    graph.recompile()


def _stays(node: fx.Node) -> bool:
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return bool(before.dtype == after.dtype)


def _split_batch_norm(graph: fx.GraphModule, node: fx.Node) -> None:
    arguments: list[Any] = list(node.args)
    paths = [None if item is None else str(item.target) for item in arguments[1:5]]
    values = [None if path is None else _tensor(graph, path).double() for path in paths]
    gamma, beta, mean, variance = values
    if mean is None or variance is None:
        return
    scale = (variance + float(arguments[7])).rsqrt() * (1 if gamma is None else gamma)
    offset = (0 if beta is None else beta) - mean * scale
    owner = str(paths[2]).rpartition(".")[0]
    shape = (-1, *[1] * (node.meta["val"].ndim - 2))
    with graph.graph.inserting_before(node):
        parts = []
        for name, value in (("scale", scale), ("offset", offset)):
            module = graph.get_submodule(owner)
            module.register_parameter(name, torch.nn.Parameter(value.float().reshape(shape)))
            parts.append(graph.graph.get_attr(f"{owner}.{name}" if owner else name))
            parts[-1].meta["val"] = value.float().reshape(shape)
        scaled = graph.graph.call_function(aten.mul.Tensor, (arguments[0], parts[0]))
        shifted = graph.graph.call_function(aten.add.Tensor, (scaled, parts[1]))
    scaled.meta, shifted.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(shifted)
    graph.graph.erase_node(node)


def _tensor(graph: fx.GraphModule, path: str) -> torch.Tensor:
    owner, _, name = path.rpartition(".")
    value = getattr(graph.get_submodule(owner), name)
    assert isinstance(value, torch.Tensor)
    return value.detach()
