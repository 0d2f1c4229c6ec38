"""`InputSpec`: what an exported file takes, as data. It travels from training to the device unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import CveffError

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class InputSpec:
    """uint8 NHWC images of `size`; scaling to [0, 1] and normalisation happen inside the graph.

    Attributes:
        size: (height, width) in pixels of what the graph takes.
        channels: 1 (grey) or 3 (RGB).
        mean, std: per channel, for values scaled to [0, 1]: the graph computes `(x / 255 - mean) / std`.
        interpolation: Pillow filter used to resize, one of `INTERPOLATIONS`.
        crop: share of the resized image that the centre crop keeps, in (0, 1]; images are first resized
            to `floor(size / crop)`, in the sense of `crop_mode`.
        enlarge: whether images smaller than `size` may be enlarged. Off, they raise `InputSizeError`:
            a model trained on large images is silently wrong on tiny ones.
        crop_mode: "center" resizes so that the image covers that size, "squash" to exactly that size
            (the aspect ratio changes), "border" so that it fits inside and fills the rest with `mean`; then
            the centre is cropped. timm's three modes.
    """

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop: float = 1.0
    enlarge: bool = False
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if (
            not isinstance(self.size, tuple)
            or len(self.size) != 2
            or not all(_is_integer(side) and side >= 1 for side in self.size)
        ):
            raise CveffError(f"input.size is {self.size!r}; give (height, width), two positive integers")
        if not _is_integer(self.channels) or self.channels not in (1, 3):
            raise CveffError(f"input.channels is {self.channels!r}; only 1 (grey) and 3 (RGB) are supported")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not isinstance(values, tuple) or not all(_is_number(value) for value in values):
                raise CveffError(f"input.{name} is {values!r}; give numbers, one a channel")
            if len(values) != self.channels:
                raise CveffError(
                    f"input.{name} has {len(values)} values; give one for each of {self.channels} channels"
                )
        if any(value <= 0 for value in self.std):
            raise CveffError(f"input.std is {self.std!r}; every value must be positive")
        if self.interpolation not in INTERPOLATIONS:
            raise CveffError(
                f"input.interpolation is {self.interpolation!r}; use one of {', '.join(INTERPOLATIONS)}"
            )
        if not _is_number(self.crop) or not 0 < self.crop <= 1:
            raise CveffError(f"input.crop is {self.crop!r}; it must lie in (0, 1]")
        if not isinstance(self.enlarge, bool):
            raise CveffError(f"input.enlarge is {self.enlarge!r}; give true or false")
        if self.crop_mode not in CROP_MODES:
            raise CveffError(f"input.crop_mode is {self.crop_mode!r}; use one of {', '.join(CROP_MODES)}")

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values; `from_json` is its inverse."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InputSpec:
        """Rebuild a spec from `to_json`'s output.

        Raises:
            CveffError: a key is unknown or missing, or a value is of a wrong type or out of range.
        """
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise CveffError(
                f"input has unknown keys {sorted(unknown)}; known: {sorted(cls.__dataclass_fields__)}"
            )
        if "size" not in values:
            raise CveffError("input.size is missing; give [height, width]")
        fixed: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fixed)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
