"""Choose how each weight is rounded from what its layer sees; what is left of the mean error goes into the bias.

Rounding to the nearest minimises the error of each weight; what matters is the error of the layer's output. Column by
column, the error of the weights rounded so far is made up for by those still to be rounded (Frantar et al., "GPTQ",
ICLR 2023; Hassibi & Stork's optimal brain surgeon), with the second moments of the layer's inputs on calibration
images. The mean error that is left goes into the bias (Nagel et al., ICCV 2019). Nothing of it costs time when the
network runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from cveff.compress.quant.layers import (
    Layer,
    find_layers,
    observe,
    shift_bias,
    weight_rounding,
)

MAX_INPUTS = 1280
"""Most inputs to an output for which errors are made up for; larger layers are rounded to the nearest."""
DAMPING = 0.01
"""Added to the second moments' diagonal, relative to its mean, so that inputs never seen do not divide by zero."""
BLOCK = 64


def round_weights(graph: fx.GraphModule, batches: Sequence[Tensor], *, seed: int = 0) -> None:
    """Put every rounded layer's weight on its grid, in place, and correct its bias.

    Args:
        graph: captured, with roundings whose steps are set.
        batches: images (B, C, H, W), normalised.
        seed: of the positions drawn.
    """
    layers = [layer for layer in find_layers(graph) if weight_rounding(graph, layer) is not None]
    generator = torch.Generator().manual_seed(seed)
    moments: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def look(layer: Layer, x: Tensor, _: Tensor) -> None:
        rows = layer.rows(x, generator)
        totals[layer.name] = totals.get(layer.name, 0) + rows.sum(1).double()
        counts[layer.name] = counts.get(layer.name, 0) + rows.shape[1]
        if rows.shape[2] <= MAX_INPUTS:
            moments[layer.name] = moments.get(layer.name, 0) + (rows.mT @ rows).double()

    observe(graph, layers, batches, look)
    for layer in layers:
        rounding = weight_rounding(graph, layer)
        assert rounding is not None
        weight = layer.matrix(graph)
        scale = rounding.scale.double().reshape(weight.shape[0], weight.shape[1], 1)
        limits = (rounding.grid.low, rounding.grid.high)
        count = counts[layer.name]
        if layer.name in moments:
            rounded = compensated(weight, scale, moments[layer.name] / count, limits)
        else:
            rounded = (weight / scale).round().clamp(*limits) * scale
        layer.put(graph, rounded)
        error = ((rounded - weight) @ (totals[layer.name] / count)[:, :, None]).reshape(-1)
        shift_bias(graph, layer, -error)


def compensated(weight: Tensor, scale: Tensor, moments: Tensor, limits: tuple[int, int]) -> Tensor:
    """Round column by column; the columns to come make up for each error.

    Args:
        weight: (groups, outputs, inputs) float64.
        scale: (groups, outputs, 1).
        moments: (groups, inputs, inputs) of what the layer reads.
        limits: least and greatest integer.
    """
    diagonal = moments.diagonal(dim1=1, dim2=2)
    damping = DAMPING * diagonal.mean(1, keepdim=True) + 1e-12
    moments = moments + damping[:, :, None] * torch.eye(moments.shape[1], dtype=moments.dtype)
    # Inputs that matter most are rounded first, while there are others left to make up for them.
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    moments = moments.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None, :], 2)
    remaining = weight.take_along_dim(order[:, None, :], 2).clone()
    is_zero = remaining == 0  # a sparse weight's zeros are not for making up: they stay
    inverse = torch.linalg.cholesky(torch.linalg.inv(moments)).mT
    rounded = torch.empty_like(remaining)
    step = scale[:, :, 0]
    for start in range(0, remaining.shape[2], BLOCK):
        stop = min(start + BLOCK, remaining.shape[2])
        errors = torch.empty(*remaining.shape[:2], stop - start, dtype=weight.dtype)
        for column in range(start, stop):
            value = remaining[:, :, column]
            nearest = (value / step).round().clamp(*limits) * step
            nearest = torch.where(is_zero[:, :, column], 0.0, nearest)
            rounded[:, :, column] = nearest
            error = (value - nearest) / inverse[:, None, column, column]
            remaining[:, :, column:stop] -= error[:, :, None] * inverse[:, None, column, column:stop]
            errors[:, :, column - start] = error
        # The columns after the block are brought up to date at once, by one matrix product.
        remaining[:, :, stop:] -= errors @ inverse[:, start:stop, stop:]
    return rounded.take_along_dim(order.argsort(dim=1)[:, None, :], 2)
