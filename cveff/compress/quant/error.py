"""How far a rounded network is from the unrounded one, as a whole and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from cveff.compress.quant.ranges import rounding_off


@torch.no_grad()
def logits(graph: fx.GraphModule, batches: Sequence[Tensor]) -> Tensor:
    """(images, classes)."""
    return torch.cat([graph(images) for images in batches])


@torch.no_grad()
def float_logits(graph: fx.GraphModule, batches: Sequence[Tensor]) -> Tensor:
    """The same with every rounding off; weights that were put on their grid stay there."""
    with rounding_off(graph):
        return logits(graph, batches)


def relative_error(rounded: Tensor, exact: Tensor) -> float:
    """Energy of the logits' change over the energy of what differs between classes, the mean over images.

    An image's energy counts as the median image's at least, and a change in an image whose logits are far larger than
    others' is held against its own.

    Args:
        rounded, exact: logits (images, classes).
    """
    energy = (exact - exact.mean(1, keepdim=True)).square().sum(1)
    difference = rounded - exact
    change = (difference - difference.mean(1, keepdim=True)).square().sum(1)
    return float((change / energy.clamp(min=max(float(energy.median()), 1e-30))).mean())
