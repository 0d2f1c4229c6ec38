"""`MemorySplit`: small images of one size, held as one uint8 array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cveff.data.dataset import ImageSource, Split
from cveff.errors import DataError
from cveff.runtime.input_spec import InputSpec


class MemorySplit(Split):
    """Images that all have one size.

    Args:
        images: (N, H, W, C) uint8, C of 1 or 3.
        targets: (N,) integers, or None.

    Raises:
        DataError: the arrays' shapes or types do not fit.
    """

    def __init__(self, name: str, images: np.ndarray, targets: np.ndarray | None) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise DataError(
                f"split {name!r}: images are {images.dtype} {images.shape}; "
                "give uint8 (N, H, W, C) with C of 1 or 3"
            )
        if targets is not None and (targets.shape != (len(images),) or targets.dtype.kind not in "iu"):
            raise DataError(
                f"split {name!r}: targets are {targets.dtype} {targets.shape}; give {len(images)} integers"
            )
        height, width, channels = images.shape[1:]
        super().__init__(name, targets, (height, width), channels)
        self.images = np.ascontiguousarray(images)

    def __len__(self) -> int:
        return len(self.images)

    def source(self, index: int) -> ImageSource:
        """The image's pixels, (H, W, C) uint8."""
        return self.images[index]

    def subset(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> MemorySplit:
        """The images at `indices`, in that order, as a split of their own."""
        chosen = np.asarray(indices, dtype=np.int64)
        targets = None if self.targets is None else self.targets[chosen]
        return MemorySplit(name or self.name, self.images[chosen], targets)

    def _make_pixels(self, spec: InputSpec) -> np.ndarray:
        if self.native_size == spec.size and self.channels == spec.channels and spec.crop == 1:
            return self.images  # preprocess neither resizes nor crops here
        return super()._make_pixels(spec)
