"""From a file, bytes or an array of any size to the uint8 NHWC batch a model takes. numpy and Pillow only.

Training's evaluation transform, the exported bundle and `run.py` all call these functions, so what the
model is scored on is what the device sees, bit for bit. The geometry is torchvision's and timm's
(`Resize` then `CenterCrop`); unlike them, EXIF rotation is honoured and 16-bit images are scaled, not clipped.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ImageError, InputSizeError
from .input_spec import InputSpec

Source = str | Path | bytes | np.ndarray | Image.Image

MAX_PIXELS = 178_956_970
"""Pixels past which a file is refused as a decompression bomb (Pillow's own error limit)."""


def decode(source: Source, channels: int = 3) -> Image.Image:
    """Read one image as Pillow mode "RGB" (`channels=3`) or "L" (`channels=1`), upright.

    Alpha is dropped and palettes are expanded, as `Image.convert` does; 16-bit grey is scaled to 8 bits.

    Args:
        source: a path, the bytes of a file, a Pillow image, or an array (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4) of dtype uint8, or uint16.

    Raises:
        ImageError: not an image, truncated, empty, too many pixels, or an unsupported array.
    """
    image = _open(source)
    image = ImageOps.exif_transpose(image) or image
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to white on conversion; scaling keeps the picture.
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ImageError(f"{_name(source)} has 32-bit values up to {values.max()}; convert it to 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ImageError(f"{_name(source)} holds floating-point pixels; convert it to 8 or 16 bits first")
    return image.convert("RGB" if channels == 3 else "L")


def fit(image: Image.Image, spec: InputSpec, resize: bool = False, name: str = "image") -> np.ndarray:
    """Resize so that the image covers `floor(size / crop)`, then crop the centre.

    Args:
        image: an image in the mode `decode` returns.
        resize: enlarge an image smaller than `spec.size` even where `spec.enlarge` is off.
        name: what to call the image in an error.

    Returns:
        (H, W, C) uint8 of `spec.size`.

    Raises:
        InputSizeError: the image is smaller than the model's input and may not be enlarged.
    """
    height, width = spec.size
    if not (resize or spec.enlarge) and (image.height < height or image.width < width):
        raise InputSizeError(
            f"{name} {image.width}×{image.height} is smaller than the model's {width}×{height} input; "
            "resize it, or pass resize=True"
        )
    cover = (math.floor(height / spec.crop), math.floor(width / spec.crop))
    new_height, new_width = _covering_size(image.height, image.width, cover)
    if (new_height, new_width) != (image.height, image.width):
        image = image.resize((new_width, new_height), Image.Resampling[spec.interpolation.upper()])
    top, left = round((new_height - height) / 2), round((new_width - width) / 2)
    image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, dtype=np.uint8).reshape(height, width, spec.channels)


def preprocess(sources: Sequence[Source] | Source, spec: InputSpec, resize: bool = False) -> np.ndarray:
    """Decode, resize and crop images into one batch.

    Args:
        sources: paths, bytes, Pillow images or arrays, one or many, each of any size.
        resize: enlarge images smaller than `spec.size` even where `spec.enlarge` is off.

    Returns:
        (N, H, W, C) uint8.

    Raises:
        ImageError, InputSizeError: as `decode` and `fit`; the message names the image.
    """
    if isinstance(sources, (str, Path, bytes, Image.Image)) or (
        isinstance(sources, np.ndarray) and sources.ndim in (2, 3)
    ):
        sources = [sources]
    batch = np.empty((len(sources), *spec.size, spec.channels), np.uint8)
    for index, source in enumerate(sources):
        batch[index] = fit(decode(source, spec.channels), spec, resize, _name(source))
    return batch


def _covering_size(height: int, width: int, cover: tuple[int, int]) -> tuple[int, int]:
    """Smallest size of the image's aspect ratio that covers `cover`; the long side is floored, as torchvision's."""
    if cover[0] * width <= cover[1] * height:
        return max(cover[0], int(cover[1] * height / width)), cover[1]
    return cover[0], max(cover[1], int(cover[0] * width / height))


def _open(source: Source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    name = _name(source)
    try:
        with warnings.catch_warnings():
            # Pillow only warns between its limit and twice that; we refuse from the limit on.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width * image.height} pixels")
            image.load()
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check the path") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder; give an image file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large to decode safely ({error}); shrink it under {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image in a format Pillow reads; convert it to PNG or JPEG") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{name} is corrupt or truncated ({error}); replace the file") from None
    return image


def _from_array(array: np.ndarray) -> Image.Image:
    shape = f"array of shape {array.shape} and dtype {array.dtype}"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ImageError(f"{shape} is not an image; give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.uint16:
        array = ((array.astype(np.int64) + 128) // 257).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"{shape} is not uint8; scale it to 0..255 and convert it with .astype('uint8')")
    return Image.fromarray(np.ascontiguousarray(array))


def _name(source: Any) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    return "image"
