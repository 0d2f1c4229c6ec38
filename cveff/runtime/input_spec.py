"""`InputSpec`: what an exported file takes, as data. It travels from training to the device unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import CveffError

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True)
class InputSpec:
    """uint8 NHWC images of `size`; scaling to [0, 1] and normalisation happen inside the graph.

    Attributes:
        size: (height, width) in pixels of what the graph takes.
        channels: 1 (grey) or 3 (RGB).
        mean, std: per channel, for values scaled to [0, 1]: the graph computes `(x / 255 - mean) / std`.
        interpolation: Pillow filter used to resize, one of `INTERPOLATIONS`.
        crop: share of the resized image that the centre crop keeps, in (0, 1]; the image is first resized
            so that it covers `floor(size / crop)`.
        enlarge: whether images smaller than `size` may be enlarged. Off, they raise `InputSizeError`:
            a model trained on large images is silently wrong on tiny ones.
    """

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop: float = 1.0
    enlarge: bool = False

    def __post_init__(self) -> None:
        if len(self.size) != 2 or any(not isinstance(side, int) or side < 1 for side in self.size):
            raise CveffError(f"input.size is {self.size!r}; give (height, width), two positive integers")
        if self.channels not in (1, 3):
            raise CveffError(f"input.channels is {self.channels!r}; only 1 (grey) and 3 (RGB) are supported")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise CveffError(f"input.{name} has {len(values)} values; give one for each of {self.channels} channels")
        if any(value <= 0 for value in self.std):
            raise CveffError(f"input.std is {self.std!r}; every value must be positive")
        if self.interpolation not in INTERPOLATIONS:
            raise CveffError(f"input.interpolation is {self.interpolation!r}; use one of {', '.join(INTERPOLATIONS)}")
        if not 0 < self.crop <= 1:
            raise CveffError(f"input.crop is {self.crop!r}; it must lie in (0, 1]")

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values; `from_json` is its inverse."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InputSpec:
        """Rebuild a spec from `to_json`'s output.

        Raises:
            CveffError: a key is unknown or missing, or a value is out of range.
        """
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise CveffError(f"input has unknown keys {sorted(unknown)}; known: {sorted(cls.__dataclass_fields__)}")
        if "size" not in values:
            raise CveffError("input.size is missing; give [height, width]")
        fixed = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**fixed)
