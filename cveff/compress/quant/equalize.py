"""Move what makes a tensor hard to round from its channels into the weights around it, which leaves the network as it is.

A tensor has one step for all its channels, so one wide channel costs the others their precision. Dividing a channel by s
where it is made and multiplying the weights that read it by s changes nothing but its range, as long as what lies between
is homogeneous (ReLU, pooling). Weights have a step for each *output* channel: dividing rows is free, multiplying columns is
not, except in depthwise convolutions, whose every column is a row.

- convolution or linear layer -> ReLU -> layer: cross-layer equalization (Nagel et al., ICCV 2019, section 4.1), with ranges
  of activations in place of the first layer's weights, since those have a step a channel here;
- layer norm -> linear layers: SmoothQuant (Xiao et al., ICML 2023), s = max|x|^α / max|w|^(1-α).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cveff.compress.quant.capture import aten, constant
from cveff.compress.quant.layers import Layer, Observe, find_layers, parameter

ALPHA = 0.5
"""The share of the difficulty that goes into the weights (SmoothQuant's default)."""
_HOMOGENEOUS = {aten.relu.default, aten.leaky_relu.default, aten.max_pool2d.default, aten.avg_pool2d.default}
_LIMIT = 100.0


@dataclass(frozen=True)
class Link:
    """A tensor that can be rescaled channel by channel.

    Attributes:
        tensor: what the readers read.
        readers: every layer that reads it.
        divided: paths of the parameters whose first axis is the tensor's channels and that are divided.
        is_norm: a layer norm makes it, not a layer with weights.
    """

    tensor: fx.Node
    readers: tuple[Layer, ...]
    divided: tuple[str, ...]
    is_norm: bool


def find_links(graph: fx.GraphModule) -> list[Link]:
    """Every tensor of a captured graph, without roundings, that equalization may rescale."""
    layers = {layer.node: layer for layer in find_layers(graph)}
    found = []
    for node in graph.graph.nodes:
        readers = [layers[user] for user in node.users if user in layers and user.args[0] is node]
        if not readers or len(readers) != len(node.users):
            continue
        maker: Any = node
        while maker.target in _HOMOGENEOUS and len(maker.args[0].users) == 1:
            maker = maker.args[0]
        if maker.target in _HOMOGENEOUS:
            continue
        if maker in layers and (maker is node or len(maker.users) == 1):
            layer = layers[maker]
            # A linear layer's channels are last and a convolution's second: a link keeps to one kind.
            same_kind = all((reader.kernel is None) == (layer.kernel is None) for reader in readers)
            if same_kind:
                paths = (layer.weight, layer.bias) if layer.bias else (layer.weight,)
                found.append(Link(node, tuple(readers), paths, is_norm=False))
        elif maker is node and node.target is aten.layer_norm.default and len(node.args) > 3:
            gamma, beta = (constant(graph, item) for item in node.args[2:4])
            own = gamma is not None and len(node.args[2].users) == 1 and gamma.ndim == 1
            linear = all(reader.kernel is None for reader in readers)
            if own and linear and (node.args[3] is None or (beta is not None and len(node.args[3].users) == 1)):
                paths = tuple(str(item.target) for item in node.args[2:4] if item is not None)
                found.append(Link(node, tuple(readers), paths, is_norm=True))
    return found


@torch.no_grad()
def equalize(graph: fx.GraphModule, links: Sequence[Link], batches: Sequence[Tensor], alpha: float = ALPHA) -> None:
    """Rescale every link's tensor in place; the network's outputs stay the same up to rounding of float32.

    Args:
        links: of `graph`, as `find_links` gives them.
        batches: images (B, C, H, W), normalised, that show each channel's range.
        alpha: 0 leaves activations as they are, 1 gives all channels the same range.
    """
    ranges = _channel_ranges(graph, links, batches)
    for link in links:
        of_tensor = ranges[link.tensor]
        of_weights = torch.stack([_column_ranges(graph, reader) for reader in link.readers]).amax(0)
        depthwise = all(reader.groups > 1 and reader.groups == len(of_tensor) for reader in link.readers)
        share = 1.0 if depthwise else alpha
        scale = of_tensor.pow(share) / of_weights.pow(1 - share).clamp(min=1e-12)
        usable = (of_tensor > 0) & (of_weights > 0)
        middle = scale[usable].log().mean().exp() if usable.any() else torch.tensor(1.0)
        scale = torch.where(usable, (scale / middle).clamp(1 / _LIMIT, _LIMIT), torch.ones_like(scale))
        for path in link.divided:
            value = parameter(graph, path)
            value.div_(scale.reshape(-1, *[1] * (value.ndim - 1)).to(value.dtype))
        for reader in link.readers:
            weight = reader.matrix(graph)  # (groups, outputs, inputs · taps)
            columns = scale.double().reshape(reader.groups, 1, -1, 1)
            taps = weight.reshape(*weight.shape[:2], columns.shape[2], -1)
            reader.put(graph, (taps * columns).reshape(weight.shape))


def _channel_ranges(
    graph: fx.GraphModule, links: Sequence[Link], batches: Sequence[Tensor]
) -> Mapping[fx.Node, Tensor]:
    axis = {link.tensor: -1 if link.readers[0].kernel is None else 1 for link in links}
    found: dict[fx.Node, Tensor] = {}

    def look(node: fx.Node, _: Tensor, value: Tensor) -> None:
        reach = value.abs().movedim(axis[node], 0).flatten(1).amax(1)
        found[node] = torch.maximum(found[node], reach) if node in found else reach

    interpreter = Observe(graph, axis, look)
    for images in batches:
        interpreter.run(images)
    return found


def _column_ranges(graph: fx.GraphModule, layer: Layer) -> Tensor:
    """(channels,) the greatest weight that reads each channel."""
    weight = layer.matrix(graph)
    taps = 1 if layer.kernel is None else layer.kernel[0] * layer.kernel[1]
    return weight.abs().reshape(*weight.shape[:2], -1, taps).amax((1, 3)).flatten().float()
