"""A rounded network with some operators back in floats, its other steps and weights as they are."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace

import torch

from cveff.compress.quant.layers import find_layers, parameter
from cveff.compress.quant.network import insert
from cveff.compress.quant.placement import place
from cveff.compress.quant.post_training import Quantized


def without(found: Quantized, exclude: Collection[str]) -> Quantized:
    """`found`, which is left as it is, with the operators `exclude` in floats: nothing is calibrated again.

    Layers that stay rounded keep weights that were chosen for rounded inputs, so a network calibrated with `exclude`
    from the start is a little better; this one tells how fast it will be, and about how good.

    Raises:
        StepError: an operator is unknown, or no layer is left to round.
    """
    graph = copy.deepcopy(found.exact)
    placement = place(graph, found.placement.scheme, {*found.placement.excluded, *exclude})
    full = {site.tensor: site for site in found.placement.sites}
    root = {name: site.like or name for name, site in full.items()}
    placement = replace(
        placement,
        sites=tuple(
            replace(site, signed=full[site.tensor].signed, symmetric=full[site.tensor].symmetric)
            for site in placement.sites
        ),
    )
    roundings = insert(graph, placement)
    for name, rounding in roundings.tensors.items():
        other = found.roundings.tensors[root[name]]
        rounding.set_steps(other.scale, other.zero_point)
    for name, rounding in roundings.weights.items():
        other = found.roundings.weights[name]
        rounding.set_steps(other.scale, other.zero_point)
    own = {layer.name: layer for layer in find_layers(graph)}
    with torch.no_grad():
        for layer in find_layers(found.graph):
            if layer.name not in roundings.weights:
                continue
            mine = own[layer.name]
            for path, source in ((mine.weight, layer.weight), (mine.bias, layer.bias)):
                parameter(graph, path).copy_(parameter(found.graph, source))
    return replace(
        found,
        graph=graph,
        placement=placement,
        roundings=roundings,
        narrowed={name: count for name, count in found.narrowed.items() if name in roundings.weights},
        before_correction={},
    )
