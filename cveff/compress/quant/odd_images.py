"""Calibration images on which a network computes values many times as large as on others.

A trained network may have directions in which nothing keeps its activations small, and a few images that go far in
them. A range that holds their values leaves all other images a few of its 256 steps. Such images are found here, so
that ranges can be made without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from cveff.compress.quant.layers import Layer, find_layers, observe

USUAL = 0.9
"""Share of the images that say what is usual: where more than the rest are odd, none is."""
FAR = 4.0
"""Times the usual that a value has to reach."""
PLACES = 0.05
"""Share of the layers where it has to, and two layers at least."""
FEWEST = 20
"""With fewer images there is no telling what is usual."""


def odd_images(exact: fx.GraphModule, batches: Sequence[Tensor]) -> Tensor:
    """Which images take the inputs of many layers far past what others do.

    Args:
        exact: the network, not rounded.
        batches: images (B, C, H, W), normalised.

    Returns:
        (images,) bool.
    """
    if sum(map(len, batches)) < FEWEST:
        return torch.zeros(sum(map(len, batches)), dtype=torch.bool)
    layers = find_layers(exact)
    reaches: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def look(layer: Layer, x: Tensor, _: Tensor) -> None:
        reaches[layer.name].append(x.flatten(1).abs().amax(1))

    observe(exact, layers, batches, look)
    seen = torch.stack([torch.cat(found) for found in reaches.values()])  # (layers, images)
    usual = seen.quantile(USUAL, dim=1, keepdim=True)
    return (seen > FAR * usual).sum(0) >= max(2.0, PLACES * len(layers))


def without(batches: Sequence[Tensor], left_out: Tensor) -> list[Tensor]:
    """The batches less the images that `left_out`, (images,) bool, marks."""
    kept = [
        images[~mask]
        for images, mask in zip(batches, left_out.split([len(images) for images in batches]), strict=True)
    ]
    return [images for images in kept if len(images)]
