"""float8 (E4M3) for GPUs that multiply it (Ada, Hopper and later), rounded where TensorRT's int8 is.

A float8 value is as precise relative to itself at any magnitude, down to 2^-6 of a step, so outliers cost nothing and
the range is simply the largest magnitude seen (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from cveff.compress.quant.capture import capture, constant, identify
from cveff.compress.quant.checks import check_images, check_parameters
from cveff.compress.quant.network import insert, is_cast, is_quantized
from cveff.compress.quant.placement import Placement, place
from cveff.compress.quant.ranges import Watch, weight_range
from cveff.errors import StepError
from cveff.runtime.input_spec import InputSpec


def to_float8(
    module: nn.Module,
    spec: InputSpec,
    batches: Sequence[Tensor],
    exclude: Collection[str] = (),
    *,
    per_channel: bool = False,
) -> tuple[fx.GraphModule, Placement]:
    """Round a network's activations and weights to float8.

    Args:
        module: float32; it is left as it is.
        batches: images (B, C, H, W), normalised.
        exclude: operators, by `identify`'s names, that stay in floats.
        per_channel: a step for each output channel of a weight; TensorRT's float8 kernels are reported to take
            one for all.

    Returns:
        the rounded graph and what is rounded in it.

    Raises:
        StepError: no images or such as do not fit, the network cannot be captured, is quantized or in 16 bits
            already, or overflows.
    """
    if is_quantized(module):
        raise StepError("the model is quantized already; start from the float model")
    if is_cast(module):
        raise StepError("the model is in 16 bits already; start from the float32 model")
    batches = check_images(batches, spec)
    graph = capture(module, spec)
    check_parameters(graph)
    placed = place(graph, "tensorrt", exclude)
    placement = replace(
        placed,
        sites=tuple(replace(site, float8=True) for site in placed.sites),
        weights=tuple(replace(site, float8=True, per_tensor=not per_channel) for site in placed.weights),
    )
    roundings = insert(graph, placement)
    watch = Watch(graph, roundings.tensors)
    watch.see(batches)
    for name, (low, high) in watch.ranges("minmax").items():
        roundings.tensors[name].set_range(torch.tensor(low), torch.tensor(high))
    nodes = identify(graph)
    for weight_site in placement.weights:
        source: Any = nodes[weight_site.reader].args[1]
        weight = constant(graph, source.args[0])
        assert weight is not None
        least, most = weight_range(weight, weight_site.axis, weight_site.grid)
        if weight_site.per_tensor:
            least, most = least.min(), most.max()
        roundings.weights[weight_site.reader].set_range(least, most)
    return graph, placement
