"""What was done in an int8 file against 16-bit sums that clip on x86 without VNNI, and what that leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cveff.compress.quant.saturation import Saturation


@dataclass(frozen=True)
class Clipping:
    """What is known of one file on such a processor, predicted from calibration images.

    Attributes:
        guard: "narrow": channels that would clip got wider steps; "half_range": every weight has 7 bits, whose sums
            cannot clip; "none": the model came in quantized.
        images: that it was predicted from; 0 where nothing had to be.
        narrowed: channels with wider steps, in `layers` layers.
        clipping: channels whose sums still clip somewhere.
        severe: those of them that lose more by it than weights of 7 bits, whose sums cannot clip, would cost.
    """

    guard: Literal["narrow", "half_range", "none"]
    images: int = 0
    narrowed: int = 0
    layers: int = 0
    clipping: int = 0
    severe: int = 0

    @classmethod
    def of(
        cls,
        guard: Literal["narrow", "none"],
        narrowed: Mapping[str, int],
        left: Mapping[str, Saturation],
        images: int,
    ) -> Clipping:
        """From what was narrowed (layer -> channels) and what `predict_saturation` says of the finished network."""
        return cls(
            guard,
            images,
            narrowed=sum(narrowed.values()),
            layers=len(narrowed),
            clipping=sum(layer.channels for layer in left.values()),
            severe=sum(int(layer.severe.sum()) for layer in left.values()),
        )

    def to_json(self) -> dict[str, Any]:
        """The manifest's `saturation`."""
        return asdict(self)
