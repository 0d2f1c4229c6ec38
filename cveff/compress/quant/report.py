"""`Calibration`: what a quantization was made from, and how ranges were chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Calibration:
    """What `Quantize` found out on calibration images.

    Attributes:
        source: the split the images are from; "" where none were looked at.
        images: how many ranges were made from (or, without ranges, how many the weights were fitted on).
        method: how ranges of activations were found; None where there are none.
        error: energy of the change of the logits over that of their differences between classes, the mean over
            calibration images that ranges were not made from; None where it was not measured.
        equalized: tensors whose channels were equalized.
        narrowed: layers -> channels with wider steps, so that 16-bit sums do not clip.
        moved: the largest change of a range from half of the images to all, relative to its width; None: not known.
        unmoved: tensors that had one value everywhere.
        left_out: images that nothing was made from, because they reach far larger values than the others.
        correction: of the channels' statistics: "none", "mean" or "statistics".
    """

    source: str = ""
    images: int = 0
    method: str | None = None
    error: float | None = None
    equalized: int = 0
    narrowed: tuple[tuple[str, int], ...] = ()
    moved: float | None = None
    unmoved: tuple[str, ...] = ()
    left_out: int = 0
    correction: str = "none"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "narrowed": dict(self.narrowed), "unmoved": list(self.unmoved)}
