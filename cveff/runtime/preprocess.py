"""From a file, bytes or an array of any size to the uint8 NHWC batch a model takes. numpy and Pillow only.

Training's evaluation transform, the exported bundle and `run.py` all call these functions, so what the
model is scored on is what the device sees, bit for bit. The geometry is that of timm's evaluation transform,
which for square inputs is torchvision's `Resize` and `CenterCrop`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .decode import MAX_PIXELS, Source, decode, source_name
from .errors import ImageError, InputSizeError
from .input_spec import InputSpec

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "Source", "decode", "fit", "preprocess"]

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".ico"),
)
"""Suffixes (in lower case) of the files that are looked at when a folder is given."""


def fit(image: Image.Image, spec: InputSpec, resize: bool = False, name: str = "image") -> np.ndarray:
    """Resize and crop as `spec` says: see `InputSpec.crop` and `InputSpec.crop_mode`.

    Args:
        image: an image in the mode `decode` returns.
        resize: enlarge an image smaller than `spec.size` even where `spec.enlarge` is off.
        name: what to call the image in an error.

    Returns:
        (H, W, C) uint8 of `spec.size`.

    Raises:
        InputSizeError: the image is smaller than the model's input and may not be enlarged.
        ImageError: the image is so long and thin that resizing it would take more than `MAX_PIXELS`.
    """
    height, width = spec.size
    if not (resize or spec.enlarge) and (image.height < height or image.width < width):
        raise InputSizeError(
            f"{name} {image.width}×{image.height} is smaller than the model's {width}×{height} input; "
            "resize it, or pass resize=True (--resize on the command line)"
        )
    new_height, new_width = resized(image.height, image.width, spec)
    if new_height * new_width > MAX_PIXELS:
        raise ImageError(
            f"{name} {image.width}×{image.height} would become {new_width}×{new_height} pixels; "
            "it is too long and thin for this model, crop it first"
        )
    if (new_height, new_width) != (image.height, image.width):
        image = image.resize((new_width, new_height), Image.Resampling[spec.interpolation.upper()])
    if spec.crop_mode == "border" and (new_height < height or new_width < width):
        image = _padded(image, spec)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, dtype=np.uint8).reshape(height, width, spec.channels)


def preprocess(sources: Sequence[Source] | Source, spec: InputSpec, resize: bool = False) -> np.ndarray:
    """Decode, resize and crop images into one batch.

    Args:
        sources: paths, bytes of files, Pillow images or RGB arrays, one or many, each of any size.
        resize: enlarge images smaller than `spec.size` even where `spec.enlarge` is off.

    Returns:
        (N, H, W, C) uint8.

    Raises:
        ImageError, InputSizeError: as `decode` and `fit`; the message names the image.
    """
    many = _as_sequence(sources)
    batch = np.empty((len(many), *spec.size, spec.channels), np.uint8)
    for index, source in enumerate(many):
        name = source_name(source, index if len(many) > 1 else None)
        batch[index] = fit(decode(source, spec.channels, name), spec, resize, name)
    return batch


def _as_sequence(sources: Sequence[Source] | Source) -> Sequence[Source]:
    if isinstance(sources, (str, os.PathLike, bytes, Image.Image)):
        return [Path(sources) if isinstance(sources, os.PathLike) else sources]
    if isinstance(sources, np.ndarray):
        return [sources] if sources.ndim in (2, 3) else list(sources)
    return sources


def resized(height: int, width: int, spec: InputSpec) -> tuple[int, int]:
    """(height, width) that an image is resized to before the crop. The modes round differently because timm's do."""
    target_height, target_width = math.floor(spec.size[0] / spec.crop), math.floor(spec.size[1] / spec.crop)
    if spec.crop_mode == "squash":
        return target_height, target_width
    ratios = height / target_height, width / target_width
    if spec.crop_mode == "border":
        ratio = max(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))
    if target_height != target_width:
        ratio = min(ratios)
        return round(height / ratio), round(width / ratio)
    if width <= height:  # torchvision's Resize: the short side exactly, the long one floored
        return int(target_width * height / width), target_width
    return target_height, int(target_height * width / height)


def _padded(image: Image.Image, spec: InputSpec) -> Image.Image:
    """`image` in the middle of a canvas no smaller than the crop, filled with the mean."""
    size = max(image.width, spec.size[1]), max(image.height, spec.size[0])
    fill = tuple(round(255 * value) for value in spec.mean)
    canvas = Image.new(image.mode, size, fill if spec.channels == 3 else fill[0])
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas
