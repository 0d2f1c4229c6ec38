"""What a network is calibrated on, and the images apart from these that choices are made by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cveff.compress.odd_images import Reaches, usual
from cveff.compress.quant.error import logits, relative_error
from cveff.compress.quant.layers import Observe, find_layers


@dataclass(frozen=True, eq=False)
class CalibrationImages:
    """
    Attributes:
        seen: batches (B, C, H, W), normalised, that ranges are made from.
        held: those that choices are made by.
        expected: (held images, classes), the float network's logits of them.
    """

    seen: list[Tensor]
    held: list[Tensor]
    expected: Tensor

    @property
    def count(self) -> int:
        """Images in all."""
        return sum(map(len, [*self.seen, *self.held]))

    def error(self, graph: fx.GraphModule) -> float:
        """How far a network's logits of the held images are from the float ones."""
        return relative_error(logits(graph, self.held), self.expected)

    def without(self, odd: Tensor) -> CalibrationImages:
        """Less those that `odd`, (images,) bool, marks; where that is all that are held, they stay."""
        first, second = odd.split([sum(map(len, self.seen)), sum(map(len, self.held))])
        seen = _usual(self.seen, first) or self.seen
        if bool(second.all()):
            return CalibrationImages(seen, self.held, self.expected)
        return CalibrationImages(seen, _usual(self.held, second), self.expected[~second])


def _usual(batches: Sequence[Tensor], odd: Tensor) -> list[Tensor]:
    return [images for images, _ in usual([(images, None) for images in batches], odd)]


def odd_images(exact: fx.GraphModule, batches: Sequence[Tensor]) -> Tensor:
    """Which images take the inputs of many layers far past what others do.

    Args:
        exact: the network, not rounded.
        batches: images (B, C, H, W), normalised.

    Returns:
        (images,) bool.
    """
    names = {layer.node: layer.name for layer in find_layers(exact)}
    reaches = Reaches([len(images) for images in batches])
    for index, images in enumerate(batches):

        def look(node: fx.Node, x: Tensor, _: Tensor, index: int = index) -> None:
            reaches.look(names[node], x, index)

        with torch.no_grad():
            Observe(exact, names, look).run(images)
    return reaches.odd()
