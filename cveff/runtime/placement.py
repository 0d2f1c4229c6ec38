"""Where a photograph lies in the model's image: from the model's pixels back to the photograph's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .input_spec import InputSpec
from .preprocess import resized

UNSEEN = 255
"""What a mask holds where the model saw nothing of the photograph."""


@dataclass(frozen=True)
class Placement:
    """A coordinate of the model's image is `scale * coordinate of the photograph + offset`.

    Attributes:
        size: (height, width) of the photograph in pixels.
        scale, offset: (x, y).
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (D, 4) of the model's image, left, top, right, bottom, on the photograph and clipped to it."""
        offset, scale = np.tile(self.offset, 2), np.tile(self.scale, 2)
        height, width = self.size
        moved: np.ndarray = (boxes - offset) / scale
        return moved.clip(0, (width, height, width, height)).astype(np.float32)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """A mask (H, W) uint8 of the model's image at the photograph's size, nearest pixel; `UNSEEN` around a crop."""
        columns, rows = (
            np.floor((np.arange(self.size[1 - axis]) + 0.5) * self.scale[axis] + self.offset[axis]).astype(
                int
            )
            for axis in (0, 1)
        )
        (y,), (x,) = (
            np.nonzero((index >= 0) & (index < side))
            for index, side in zip((rows, columns), mask.shape, strict=True)
        )
        result = np.full(self.size, UNSEEN, np.uint8)
        result[np.ix_(y, x)] = mask[np.ix_(rows[y], columns[x])]
        return result


def place(height: int, width: int, spec: InputSpec) -> Placement:
    """Where `preprocess.fit` puts a photograph of that size."""
    new_size = resized(height, width, spec)
    offsets = []
    for new, side in zip(new_size, spec.size, strict=True):
        canvas = max(new, side)  # what is smaller than the crop was put in the middle of a border
        offsets.append((canvas - new) // 2 - round((canvas - side) / 2))
    scale = (new_size[1] / width, new_size[0] / height)
    return Placement((height, width), scale, (float(offsets[1]), float(offsets[0])))
