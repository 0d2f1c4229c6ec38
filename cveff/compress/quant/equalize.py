"""Move what makes tensors hard to round from their channels into the weights around them, which leaves the network as
it is.

A tensor has one step for all its channels, so one wide channel costs the others their precision. Dividing a channel
by s where it is made and multiplying the weights that read it by s changes nothing but its range, as long as what
lies between is homogeneous (`channel_groups`). Weights have a step for each *output* channel: dividing rows is free,
multiplying columns is not, except in depthwise convolutions, whose every column is a row.

- behind convolutions and linear layers: cross-layer equalization (Nagel et al., ICCV 2019, section 4.1), over whole
  residual
  streams and with ranges of activations in place of the first layer's weights, since those have a step a channel here;
- behind layer norms: SmoothQuant (Xiao et al., ICML 2023), s = max|x|^α / max|w|^(1-α).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from cveff.compress.quant.channel_groups import ChannelGroup
from cveff.compress.quant.layers import Layer, Observe, parameter

ALPHA = 0.5
"""The share of the difficulty that goes into the weights (SmoothQuant's default)."""
FLOOR = 0.25
"""Of a tensor's range: no channel is taken to be narrower. One that hardly fires on a few hundred images may on
another, and would be clipped where its range was stretched too far."""
_LIMIT = 100.0


@torch.no_grad()
def equalize(
    graph: fx.GraphModule, groups: Sequence[ChannelGroup], batches: Sequence[Tensor], alpha: float = ALPHA
) -> None:
    """Rescale every group's channels in place; the network's outputs stay the same up to rounding of float32.

    Args:
        groups: of `graph`, as `channel_groups` gives them.
        batches: images (B, C, H, W), normalised, that show each channel's range.
        alpha: 0 leaves activations as they are, 1 gives all channels the same range.
    """
    ranges = _channel_ranges(graph, groups, batches)
    for group in groups:
        scale = _scales(graph, group, [ranges[tensor] for tensor in group.tensors], alpha)
        for path in group.divided:
            value = parameter(graph, path)
            value.div_(scale.reshape(-1, *[1] * (value.ndim - 1)).to(value.dtype))
        for reader in group.readers:
            weight = reader.matrix(graph)  # (groups, outputs, inputs · taps)
            columns = scale.double().reshape(reader.groups, 1, -1, 1)
            taps = weight.reshape(*weight.shape[:2], columns.shape[2], -1)
            reader.put(graph, (taps * columns).reshape(weight.shape))


def _scales(graph: fx.GraphModule, group: ChannelGroup, ranges: Sequence[Tensor], alpha: float) -> Tensor:
    """(channels,) what each channel is divided by."""
    of_tensors = (
        torch.stack([reach / reach.max().clamp(min=1e-30) for reach in ranges]).amax(0).clamp(min=FLOOR)
    )
    columns = [_column_ranges(graph, reader) for reader in group.readers]
    of_weights = torch.stack([reach / reach.max().clamp(min=1e-30) for reach in columns]).amax(0)
    depthwise = all(reader.groups > 1 and reader.groups == len(of_tensors) for reader in group.readers)
    share = 1.0 if depthwise else alpha
    scale = of_tensors.pow(share) / of_weights.pow(1 - share).clamp(min=1e-12)
    usable = of_weights > 0
    if not usable.any():
        return torch.ones_like(scale)
    middle = scale[usable].log().mean().exp()
    return torch.where(usable, (scale / middle).clamp(1 / _LIMIT, _LIMIT), 1.0)


def _channel_ranges(
    graph: fx.GraphModule, groups: Sequence[ChannelGroup], batches: Sequence[Tensor]
) -> Mapping[fx.Node, Tensor]:
    axis = {tensor: group.axis for group in groups for tensor in group.tensors}
    found: dict[fx.Node, Tensor] = {}

    def look(node: fx.Node, _: Tensor, value: Tensor) -> None:
        reach = value.abs().movedim(axis[node], 0).flatten(1).amax(1)
        found[node] = torch.maximum(found[node], reach) if node in found else reach

    interpreter = Observe(graph, axis, look)
    for images in batches:
        interpreter.run(images)
    return found


def _column_ranges(graph: fx.GraphModule, layer: Layer) -> Tensor:
    """(channels,) the greatest weight that reads each channel, relative to its output's greatest."""
    weight = layer.matrix(graph).abs()
    relative = weight / weight.amax(2, keepdim=True).clamp(min=1e-30)
    taps = 1 if layer.kernel is None else layer.kernel[0] * layer.kernel[1]
    return relative.reshape(*weight.shape[:2], -1, taps).amax((1, 3)).flatten().float()
