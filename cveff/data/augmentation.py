"""`Augmentation`: the settings of random changes to training images, without the torch that applies them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cveff.errors import DataError


@dataclass(frozen=True)
class Augmentation:
    """How training images vary; everything is off by default.

    Attributes:
        flip: mirror left and right: "none"; "random", a coin for every image and epoch; "alternating", a
            coin for every image, and every second epoch shows the other side.
        crop_padding: pixels of reflected border from which a window of the original size is cut.
        min_scale: smallest share of the image's area that a random resized crop keeps; 1.0 is off.
        erasing: probability that a rectangle (2 to 30 % of the area) becomes Gaussian noise.
        mixup: alpha of the Beta distribution that blends two images; 0 is off.
        cutmix: alpha of the Beta distribution of the pasted area; 0 is off. With both, a fair coin for
            each batch chooses between them.
    """

    flip: Literal["none", "random", "alternating"] = "none"
    crop_padding: int = 0
    min_scale: float = 1.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if self.flip not in ("none", "random", "alternating"):
            raise DataError(f"augmentation.flip is {self.flip!r}; use 'none', 'random' or 'alternating'")
        if (
            isinstance(self.crop_padding, bool)
            or not isinstance(self.crop_padding, int)
            or self.crop_padding < 0
        ):
            raise DataError(f"augmentation.crop_padding is {self.crop_padding!r}; give pixels, 0 or more")
        if not 0 < self.min_scale <= 1:
            raise DataError(
                f"augmentation.min_scale is {self.min_scale!r}; give a share of the area in (0, 1]"
            )
        if not 0 <= self.erasing <= 1:
            raise DataError(f"augmentation.erasing is {self.erasing!r}; give a probability in [0, 1]")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DataError(
                    f"augmentation.{name} is {getattr(self, name)!r}; give an alpha, 0 (off) or more"
                )

    @property
    def mixes(self) -> bool:
        """Whether targets become soft."""
        return self.mixup > 0 or self.cutmix > 0
