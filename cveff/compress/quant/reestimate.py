"""Give every channel of a rounded network the mean, or mean and deviation, that it has in the float network.

Rounding shifts the mean of a layer's output and changes its spread; layers behind it were trained for neither. From
front to back, each layer's channels are brought back to what calibration images say of the float network, with all
layers before it already brought back. Means alone: empirical bias correction (Nagel et al., "Data-Free Quantization",
ICCV 2019, section 4.2). With deviations: what batch norms inserted behind the layers and estimated again would do,
which RepVGG's authors advise for merged branches; here the factor goes into the steps of the weights and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from cveff.compress.quant.layers import Layer, Observe, find_layers, parameter, weight_rounding

Correction = Literal["none", "mean", "statistics"]

IMAGES = 128
"""Run as one batch, so that a layer sees all of them behind layers that are corrected."""
MOST = 1.25
"""Factor, or one over it, past which a channel's deviation is not brought back: it hardly moves at all."""


@torch.no_grad()
def reestimate(
    graph: fx.GraphModule, exact: fx.GraphModule, batches: Sequence[Tensor], *, deviations: bool
) -> None:
    """Change biases, and steps of weights, so that layers' outputs have the statistics that they have in `exact`.

    Args:
        graph: rounded, changed in place; weights on their grid stay on it.
        exact: the same network without roundings.
        batches: images (B, C, H, W), normalised; the first `IMAGES` of them are used.
        deviations: standard deviations too, for layers with a step an output channel.
    """
    images = torch.cat(list(batches))[:IMAGES]
    wanted: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {layer.node: layer for layer in find_layers(exact)}

    def look(node: fx.Node, _: Tensor, y: Tensor) -> None:
        wanted[layers[node].name] = _statistics(layers[node], y)

    Observe(exact, layers, look).run(images)
    _Correct(graph, wanted, deviations).run(images)


class _Correct(fx.Interpreter):
    """Runs a rounded graph and corrects each layer once its output is known, before anything reads it."""

    def __init__(
        self, graph: fx.GraphModule, wanted: dict[str, tuple[Tensor, Tensor]], deviations: bool
    ) -> None:
        super().__init__(graph)
        self._graph, self._wanted, self._deviations = graph, wanted, deviations
        rounded = [layer for layer in find_layers(graph) if weight_rounding(graph, layer) is not None]
        self._layers = {layer.node: layer for layer in rounded if layer.bias}

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator."""
        result = super().run_node(n)
        layer = self._layers.get(n)
        if layer is None or not isinstance(result, Tensor):
            return result
        mean, deviation = _statistics(layer, result)
        wanted_mean, wanted_deviation = self._wanted[layer.name]
        rounding = weight_rounding(self._graph, layer)
        assert rounding is not None
        factor = torch.ones_like(mean)
        if self._deviations and rounding.scale.numel() == len(mean):
            factor = (wanted_deviation / deviation.clamp(min=1e-12)).clamp(1 / MOST, MOST)
            weight = parameter(self._graph, layer.weight)
            # The integers stay what they are: weight and step grow alike.
            weight.mul_(factor.reshape(-1, *[1] * (weight.ndim - 1)))
            rounding.scale.mul_(factor.reshape(rounding.scale.shape))
        bias = parameter(self._graph, layer.bias)
        bias.copy_((bias - mean) * factor + wanted_mean)
        shape = [1] * result.ndim
        shape[_channel_dim(layer, result)] = -1
        return (result - mean.reshape(shape)) * factor.reshape(shape) + wanted_mean.reshape(shape)


def _channel_dim(layer: Layer, y: Tensor) -> int:
    return y.ndim - 1 if layer.kernel is None else 1


def _statistics(layer: Layer, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a layer's output, (channels,) each."""
    rows = y.movedim(_channel_dim(layer, y), 0).flatten(1)
    return rows.mean(1), rows.std(1, correction=0)
