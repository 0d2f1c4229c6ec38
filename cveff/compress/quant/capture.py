"""A network as one flat graph of tensor operators with every batch norm folded: what quantization works on.

Rounding has to be placed between operators (an addition, a concatenation) that are no modules, and batch norms have
to be gone: engines fold them, so scales of unfolded weights would be scales of other weights. The graph is that of
`torch.export` in evaluation mode with any batch size; it trains (dropout and batch statistics are gone) and is exported
again like any module.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from cveff.compress.regions import inline_regions
from cveff.errors import StepError
from cveff.runtime.errors import first_line
from cveff.runtime.input_spec import InputSpec

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv_transpose2d.input,
}
_OUTPUT_AXIS = {aten.conv_transpose2d.input: 1}
"""Axis of a weight's output channels, where it is not the first."""
_BATCH_NORMS = {aten.batch_norm.default}
_NOTHING = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
}
"""Operators that pass their first argument on, in evaluation mode."""
_IN_PLACE = {
    aten.relu_.default: aten.relu.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.silu_.default: aten.silu.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.gelu_.default: aten.gelu.default,
    aten.clamp_.default: aten.clamp.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
}
"""A rounded copy of a value must not change when the value does: nothing works in place."""

_PADS = {aten.constant_pad_nd.default, aten.pad.default}
"""Zeros around an image: exporters write them into the convolution behind, unless a rounding is in the way."""


def capture(module: nn.Module, spec: InputSpec) -> fx.GraphModule:
    """The graph of `module`, which is left as it was, with copies of its weights.

    Parameters keep their paths; a folded convolution without a bias gets one beside its weight.

    Args:
        spec: size and channels of the images, (N, channels, *size) float, normalised.

    Returns:
        a graph module that takes images and returns logits; `identify` names its nodes.

    Raises:
        StepError: the network cannot be exported.
    """
    network = copy.deepcopy(module).cpu().float().eval()
    for part in network.modules():
        if getattr(part, "fused_attn", False) is True:
            part.fused_attn = False  # type: ignore[assignment]
    example = torch.zeros(2, spec.channels, *spec.size)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
            )
    except Exception as error:  # the exporter raises whatever the network's own code does
        raise StepError(
            f"{type(module).__name__} cannot be quantized: torch.export fails: {first_line(error)}"
        ) from error
    graph = _plain(program.module())
    inline_regions(graph)
    _functional(graph)
    _drop_idle(graph)
    _pool_by_mean(graph)
    _name_clamps(graph)
    _split_silu(graph)
    _fold_batch_norms(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    for parameter in graph.parameters():
        parameter.requires_grad_(True)
    return graph


def identify(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """A name for every operator that outlives versions of PyTorch: its module's path, operator and how many of the same
    came before there. `"input"` is the images' placeholder."""
    found: dict[str, fx.Node] = {}
    counts: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            found["input"] = node
        if node.op != "call_function":
            continue
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]).partition("@")[0] if stack else ""
        base = f"{path}:{operator_name(node)}"
        found[f"{base}:{counts[base]}"] = node
        counts[base] += 1
    return found


def operator_name(node: fx.Node) -> str:
    """`conv2d`, `add`, `getitem`, …, whatever the overload."""
    if node.target is operator.getitem:
        return "getitem"
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet if packet is not None else node.target, "__name__", node.target))


def constant(graph: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The parameter or buffer that `node` reads, or None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(graph.get_submodule(owner), name, None)
    return value if isinstance(value, torch.Tensor) else None


def set_parameter(graph: fx.GraphModule, path: str, value: torch.Tensor) -> None:
    """Put a parameter at `path`, new or in place of the one that is there."""
    owner, _, name = path.rpartition(".")
    graph.get_submodule(owner).register_parameter(name, nn.Parameter(value.detach().clone()))


def output_axis(node: fx.Node) -> int:
    """The axis of a weighted operator's weight that its output channels lie on."""
    return _OUTPUT_AXIS.get(node.target, 0)  # type: ignore[call-overload, no-any-return]


def pads_zeros(node: Any) -> bool:
    """Whether an operator does nothing but put zeros around an image."""
    if node.target not in _PADS:
        return False
    value: Any = (
        node.args[3]
        if len(node.args) > 3
        else node.args[2]
        if node.target is aten.constant_pad_nd.default and len(node.args) > 2
        else 0
    )
    mode = node.args[2] if node.target is aten.pad.default and len(node.args) > 2 else "constant"
    return mode == "constant" and not value


def _plain(exported: Any) -> fx.GraphModule:
    """An exported module without its guards, its tree of arguments and its refusal to be trained."""
    graph: fx.Graph = exported.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
    output = next(node for node in graph.nodes if node.op == "output")
    logits: Any = output.args[0]
    while isinstance(logits, (tuple, list)):
        if len(logits) != 1:
            raise StepError(
                f"the network returns {len(logits)} values; only one tensor of logits can be quantized"
            )
        logits = logits[0]
    output.args = (logits,)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(exported, graph)


def _functional(graph: fx.GraphModule) -> None:
    """Operators that work in place return a new value; who read the old one afterwards reads the new one."""
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        if node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
            node.args[0].replace_all_uses_with(node, lambda user, place=order[node]: order[user] > place)


def _drop_idle(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        contiguous = node.target is aten.contiguous.default
        if node.target in _NOTHING or contiguous or (node.target is aten.clone.default):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # what made its input contiguous is gone


def _pool_by_mean(graph: fx.GraphModule) -> None:
    """Global pooling has one name: the mean over the last two axes."""
    for node in graph.graph.nodes:
        if node.target is aten.adaptive_avg_pool2d.default and all(side == 1 for side in node.args[1]):
            node.target, node.args = aten.mean.dim, (node.args[0], [-2, -1], True)


def _name_clamps(graph: fx.GraphModule) -> None:
    """ReLU and ReLU6 have one name each, however they are written."""
    for node in graph.graph.nodes:
        if node.target is aten.relu6.default:
            node.target, node.args = aten.hardtanh.default, (node.args[0], 0.0, 6.0)
        elif node.target in (aten.clamp.default, aten.clamp_min.default):
            low, high = (*node.args[1:], None, None)[:2]
            low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
            if low == 0 and high is None:
                node.target, node.args, node.kwargs = aten.relu.default, node.args[:1], {}
            elif low == 0 and isinstance(high, (int, float)):
                node.target, node.args, node.kwargs = (
                    aten.hardtanh.default,
                    (node.args[0], 0.0, float(high)),
                    {},
                )


def _split_silu(graph: fx.GraphModule) -> None:
    """`x · sigmoid(x)`: engines have integer kernels for both, and none for the two together."""
    for node in list(graph.graph.nodes):
        if node.target is aten.silu.default:
            with graph.graph.inserting_before(node):
                gate = graph.graph.call_function(aten.sigmoid.default, (node.args[0],))
            gate.meta = dict(node.meta)
            node.target, node.args = aten.mul.Tensor, (node.args[0], gate)


def _fold_batch_norms(graph: fx.GraphModule) -> None:
    """`bn(w x + b) = (w γ/σ) x + (b - μ) γ/σ + β` wherever the norm is the only reader (Jacob et al., CVPR 2018,
    3.2)."""
    for norm in list(graph.graph.nodes):
        if norm.target not in _BATCH_NORMS:
            continue
        source = norm.args[0]
        is_weighted = source.target in CONVOLUTIONS or source.target is aten.linear.default
        if not is_weighted or len(source.users) != 1:
            continue
        weight = constant(graph, source.args[1])
        bias_node: Any = source.args[2] if len(source.args) > 2 else None
        bias = constant(graph, bias_node)
        # A shared weight cannot take one norm's scale, and neither can the groups of a transposed convolution.
        is_shared = len(source.args[1].users) != 1 or (bias is not None and len(bias_node.users) != 1)
        grouped = (
            source.target is aten.conv_transpose2d.input and len(source.args) > 6 and source.args[6] != 1
        )
        if weight is None or is_shared or grouped or (bias_node is not None and bias is None):
            continue
        gamma, beta, mean, variance = (constant(graph, argument) for argument in norm.args[1:5])
        if mean is None or variance is None:
            continue
        scale = (variance.double() + float(norm.args[7])).rsqrt()
        scale = scale if gamma is None else scale * gamma.double()
        offset = -mean.double() if bias is None else bias.double() - mean.double()
        offset = offset * scale if beta is None else offset * scale + beta.double()
        shape = [1] * weight.ndim
        shape[output_axis(source)] = -1
        weight_path = str(source.args[1].target)
        bias_path = str(bias_node.target) if bias is not None else _free(graph, weight_path)
        set_parameter(graph, weight_path, (weight.double() * scale.reshape(shape)).to(weight.dtype))
        set_parameter(graph, bias_path, offset.to(weight.dtype))
        if bias is None:
            with graph.graph.inserting_before(source):
                bias_node = graph.graph.get_attr(bias_path)
            source.args = (*source.args[:2], bias_node, *source.args[3:])
        norm.replace_all_uses_with(source)
        graph.graph.erase_node(norm)


def _free(graph: fx.GraphModule, weight_path: str) -> str:
    """A path for a new bias beside a weight."""
    owner, _, _ = weight_path.rpartition(".")
    taken = graph.get_submodule(owner)
    name = "bias" if getattr(taken, "bias", None) is None else "folded_bias"
    return f"{owner}.{name}" if owner else name
