"""What a network is calibrated on, and the images apart from these that choices are made by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from cveff.compress.quant.error import logits, relative_error
from cveff.compress.quant.odd_images import without


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
        seen = without(self.seen, first) or self.seen
        if bool(second.all()):
            return CalibrationImages(seen, self.held, self.expected)
        return CalibrationImages(seen, without(self.held, second), self.expected[~second])
