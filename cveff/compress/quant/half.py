"""A network in float16 or bfloat16, and in float32 where it must be; conversions are operators of its graph.

The exported file is strongly typed as it stands. What must be float32 is in `half_rules` (operators) and `half_ranges`
(values); what may be either is divided by `half_types`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, fx, nn

from cveff.compress.quant.capture import aten, capture, constant, identify
from cveff.compress.quant.checks import check_excluded, check_images
from cveff.compress.quant.half_ranges import Kept, out_of_range
from cveff.compress.quant.half_rules import COMPUTE, data_inputs, is_float, tidy
from cveff.compress.quant.half_types import choose_types
from cveff.compress.quant.network import is_cast, is_quantized
from cveff.edits import Edit
from cveff.errors import CheckpointError, StepError
from cveff.runtime.input_spec import InputSpec

HalfPrecision = Literal["fp16", "bf16"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class HalfGraph:
    """Edit: the network becomes its graph, with batch norms folded, in 16 bits but for some operators.

    Attributes:
        input: `InputSpec` as JSON: what the graph is captured for.
        precision: "fp16" or "bf16".
        float32: operators, by `identify`'s names, that compute in float32; constants by their path.
    """

    input: Any
    precision: HalfPrecision
    float32: tuple[str, ...] = ()
    kind: ClassVar[str] = "half"

    def apply(self, module: nn.Module) -> nn.Module:
        """The graph of `module` in 16 bits, parameters included.

        Raises:
            StepError: the network cannot be captured, or is quantized or in 16 bits already.
            CheckpointError: the network has no such operators, or the precision is unknown.
        """
        if self.precision not in DTYPES:
            raise CheckpointError(f"precision {self.precision!r} is unknown; known: {', '.join(DTYPES)}")
        graph = _captured(module, InputSpec.from_json(dict(self.input)))
        known = names_of(graph)
        unknown = sorted(set(self.float32) - set(known.values()))
        if unknown:
            raise CheckpointError(
                f"the network has no operator {unknown[0]!r}; this model was written for another network or cveff"
            )
        cast(
            graph, {node for node, name in known.items() if name not in self.float32}, DTYPES[self.precision]
        )
        return graph


@dataclass(frozen=True)
class Half:
    """A network in 16 bits.

    Attributes:
        graph: takes images (N, C, H, W) float32, normalised, and returns logits float32.
        edit: rebuilds it.
        kept: operators that would compute in 16 bits, and do not because of their values.
        asked: those that were excluded.
        casts: conversions in the graph.
        num_half, num_float: operators on floats that compute in 16 and in 32 bits.
    """

    graph: fx.GraphModule
    edit: Edit
    kept: tuple[Kept, ...]
    asked: tuple[str, ...]
    casts: int
    num_half: int
    num_float: int


def to_half(
    module: nn.Module,
    spec: InputSpec,
    batches: Sequence[Tensor],
    precision: HalfPrecision = "fp16",
    exclude: Collection[str] = (),
) -> Half:
    """Decide every operator's type from calibration images, and convert.

    Args:
        module: float32; it is left as it is.
        batches: images (B, C, H, W), normalised.
        exclude: operators, by `identify`'s names, that stay in float32.

    Raises:
        StepError: the precision or an excluded operator is unknown, there are no images or such as do not fit, a value
            is NaN or infinite, no product is left in 16 bits, or the network is quantized or in 16 bits already.
    """
    if precision not in get_args(HalfPrecision):
        raise StepError(
            f"precision {precision!r} is unknown; give one of {', '.join(get_args(HalfPrecision))}"
        )
    batches = check_images(batches, spec)
    graph = _captured(module, spec)
    nodes = identify(graph)
    check_excluded(graph, exclude)
    kept = out_of_range(graph, batches, half=precision == "fp16")
    wide = {nodes[item.operator] for item in kept} | {nodes[name] for name in exclude}
    halves = choose_types(graph, wide)
    if not any(node.target in COMPUTE for node in halves):
        first = f": {kept[0].operator}, {kept[0].reason}" if kept else ""
        raise StepError(
            f"no layer is left to compute in {precision}{first}; use bf16, or keep the model in float32"
        )
    names = names_of(graph)
    edit = HalfGraph(
        input=spec.to_json(),
        precision=precision,
        float32=tuple(name for node, name in names.items() if node not in halves),
    )
    num_float = sum(node.op == "call_function" and node not in halves for node in names)
    num_half = sum(node.op == "call_function" for node in halves)
    casts = cast(graph, halves, DTYPES[precision])
    return Half(graph, edit, tuple(kept), tuple(sorted(exclude)), casts, num_half, num_float)


def cast(graph: fx.GraphModule, halves: Collection[fx.Node], dtype: torch.dtype) -> int:
    """Compute and store `halves` in `dtype`, in place, and convert where types change.

    Returns:
        how many conversions there are.

    Raises:
        StepError: a parameter that is to be stored in 16 bits is too large for them.
    """
    types = {node: dtype if node in halves else torch.float32 for node in graph.graph.nodes}
    converted: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in [node for node in graph.graph.nodes if node.op == "placeholder"] if halves else []:
        # Whoever halves a network's images because its first parameter is in 16 bits is right as well.
        with graph.graph.inserting_after(node):
            images = graph.graph.call_function(aten.to.dtype, (node, torch.float32))
        node.replace_all_uses_with(images, lambda user, images=images: user is not images)
        images.meta, types[images] = dict(node.meta), torch.float32
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and is_float(node):
            _store(graph, node, types[node])
        computes = node.op in ("call_function", "call_module") and is_float(node)
        if node.op != "output" and not computes:
            continue
        for source in data_inputs(node):
            wanted = types[node]
            if types[source] == wanted or isinstance(source.meta["val"], (list, tuple)):
                continue
            if (source, wanted) not in converted:
                with graph.graph.inserting_after(source):
                    new = graph.graph.call_function(aten.to.dtype, (source, wanted))
                new.meta = {
                    "val": source.meta["val"].to(wanted),
                    "nn_module_stack": node.meta.get("nn_module_stack"),
                }
                converted[source, wanted] = new
            node.replace_input_with(source, converted[source, wanted])
        if node.target in COMPUTE and types[node] is torch.float16:
            node.target = COMPUTE[node.target]
    graph.graph.lint()
    graph.recompile()
    return len(converted)


def _captured(module: nn.Module, spec: InputSpec) -> fx.GraphModule:
    if is_quantized(module):
        raise StepError("the model is quantized already; start from the float model")
    if is_cast(module):
        raise StepError("the model is in 16 bits already; start from the float32 model")
    graph = capture(module, spec)
    describe_constants(graph)
    tidy(graph)
    return graph


def describe_constants(graph: fx.GraphModule) -> None:
    """Give the nodes that read parameters and buffers their values as `meta["val"]`."""
    for node in graph.graph.nodes:
        value = constant(graph, node)
        if value is not None:
            node.meta["val"] = value.detach()


def names_of(graph: fx.GraphModule) -> Mapping[fx.Node, str]:
    """Every operator on floats and every constant that may be either, by a name that outlives versions of PyTorch."""
    found = {
        node: name for name, node in identify(graph).items() if node.op == "call_function" and is_float(node)
    }
    for node in graph.graph.nodes:
        if node.op == "get_attr" and is_float(node):
            found[node] = str(node.target)
    return found


def _store(graph: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> None:
    value = constant(graph, node)
    assert value is not None
    stored = value.detach().to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise StepError(
            f"parameter {node.target} reaches {float(value.detach().abs().max()):.3g}, more than {dtype} holds; "
            "exclude the operator that reads it"
        )
    owner, _, name = str(node.target).rpartition(".")
    holder = graph.get_submodule(owner)
    if name in holder._parameters:
        setattr(holder, name, nn.Parameter(stored, requires_grad=value.requires_grad))
    else:
        setattr(holder, name, stored)
    node.meta["val"] = stored
