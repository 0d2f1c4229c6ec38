"""What a network rounded for TensorRT leaves in floats, in float16: its file is 8 bits where it rounds, 16 elsewhere.

TensorRT computes what an 8-bit kernel does not take in the type its tensors have, and an 8-bit layer writes the type of
the scale behind it. So the roundings' steps become values of float16; a rounding reads and writes either type without
a conversion, as QuantizeLinear and DequantizeLinear do (`cveff.export.qdq` writes them so).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from cveff.compress.quant.capture import identify
from cveff.compress.quant.checks import check_excluded, check_images
from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.compress.quant.half import Half, cast, describe_constants, names_of
from cveff.compress.quant.half_ranges import out_of_range
from cveff.compress.quant.half_rules import reads_any_type, tidy
from cveff.compress.quant.half_types import choose_types
from cveff.compress.quant.network import is_cast, is_quantized
from cveff.errors import CheckpointError, StepError
from cveff.runtime.input_spec import InputSpec

LEAST_STEP = 2.0**-14
"""float16's smallest normal number: below it a step would lose digits."""


@dataclass(frozen=True)
class HalfRest:
    """Edit: what a rounded network computes in floats, it computes in float16 but for some operators.

    Attributes:
        float32: operators, by `identify`'s names, that compute in float32; constants by their path.
    """

    float32: tuple[str, ...] = ()
    kind: ClassVar[str] = "half_rest"

    def apply(self, module: nn.Module) -> fx.GraphModule:
        """`module`, which `QuantizedGraph` made, with its floats in float16, parameters included.

        Raises:
            StepError: the network is not rounded, or in 16 bits already.
            CheckpointError: the network has no such operators.
        """
        graph = _prepared(module)
        known = names_of(graph)
        unknown = sorted(set(self.float32) - set(known.values()))
        if unknown:
            raise CheckpointError(
                f"the network has no operator {unknown[0]!r}; this model was written for another network or cveff"
            )
        cast(graph, {node for node, name in known.items() if name not in self.float32}, torch.float16)
        return graph


def halve_rest(
    module: nn.Module, spec: InputSpec, batches: Sequence[Tensor], exclude: Collection[str] = ()
) -> Half:
    """Decide the type of every operator of a rounded network, round its steps to float16, and convert.

    The integers that weights are stored as stay what they are: weights move with their steps.

    Args:
        module: rounded by the "tensorrt" scheme, in float32; it is left as it is.
        batches: images (B, C, H, W), normalised: what float16 does not hold is seen on them.
        exclude: operators, by `identify`'s names, that stay in float32.

    Raises:
        StepError: as `to_half`; or a step is too small for float16.
    """
    batches = check_images(batches, spec)
    graph = _prepared(module)
    _round_steps(graph)
    nodes = identify(graph)
    check_excluded(graph, exclude)
    kept = out_of_range(graph, batches)
    halves = choose_types(graph, {nodes[item.operator] for item in kept} | {nodes[name] for name in exclude})
    names = names_of(graph)
    edit = HalfRest(tuple(name for node, name in names.items() if node not in halves))
    operators = [node for node in names if node.op == "call_function"]
    num_half = sum(node in halves for node in operators)
    casts = cast(graph, halves, torch.float16)
    return Half(graph, edit, tuple(kept), tuple(sorted(exclude)), casts, num_half, len(operators) - num_half)


def _prepared(module: nn.Module) -> fx.GraphModule:
    if not isinstance(module, fx.GraphModule) or not is_quantized(module):
        raise StepError("only a rounded network has a rest; quantize it first")
    if is_cast(module):
        raise StepError("the network is in 16 bits already; start from the one that is rounded only")
    graph = copy.deepcopy(module).cpu().eval()
    describe_constants(graph)
    for node in graph.graph.nodes:
        if reads_any_type(node):
            node.meta["val"] = node.args[0].meta["val"]
    tidy(graph)
    return graph


@torch.no_grad()
def _round_steps(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if not reads_any_type(node):
            continue
        part = graph.get_submodule(str(node.target))
        assert isinstance(part, FakeQuantize)
        step = part.scale.half().float().clamp(min=LEAST_STEP)
        if not bool(torch.isfinite(step).all()):
            raise StepError(
                f"a step of {float(part.scale.max()):.3g} is more than float16 holds; leave the rest in float32"
            )
        source = node.args[0]
        if source.op == "get_attr":
            weight = graph.get_parameter(str(source.target))
            shape = [1] * weight.ndim
            if part.axis is not None:
                shape[part.axis] = -1
            # A step that had to grow to be held keeps its weights, which then take fewer integers.
            grown = part.scale < LEAST_STEP
            moved = torch.where(grown, torch.ones_like(step), step / part.scale)
            weight.mul_(moved.reshape(shape) if part.axis is not None else moved)
        part.scale.copy_(step)
