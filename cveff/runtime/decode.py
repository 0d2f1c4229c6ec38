"""One image from a file, bytes or an array, upright and in 8 bits, or an error that says what is wrong.

Bundles meet files from anywhere, so only common formats are tried (no PostScript, which Pillow hands to
another program), sizes are checked before anything is decoded, and damage is an error, not grey areas.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import ImageError

Source = str | Path | bytes | np.ndarray | Image.Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO", "AVIF")
"""Pillow's names of the formats that are read; those its `preinit` loads come first, AVIF last, because a
Pillow without it refuses the name once it is reached."""

MAX_PIXELS = 178_956_970
"""Pixels past which an image is refused as a decompression bomb (Pillow's own error limit)."""

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    RuntimeError,  # the AVIF decoder
)


def decode(source: Source, channels: int = 3, name: str | None = None) -> Image.Image:
    """Read one image as Pillow mode "RGB" (`channels=3`) or "L" (`channels=1`), upright.

    EXIF rotation is applied; where the EXIF block cannot be read, the image counts as upright. Alpha is
    dropped and palettes are expanded, as `Image.convert` does; 16-bit grey is scaled to 8 bits, rounded. Of
    an animation or a multi-page file, the first frame is read.

    Args:
        source: a path, the bytes of a file, a Pillow image, or an array (H, W), (H, W, 1), (H, W, 3: RGB) or
            (H, W, 4: RGBA) of dtype uint8 or uint16.
        name: what to call the image in an error.

    Raises:
        ImageError: not an image, damaged, truncated, empty, too many pixels, or an unsupported array.
    """
    name = name or source_name(source)
    image = _upright(_open(source, name))
    if image.mode.startswith("I"):
        return _from_array(_sixteen_bits(image, name), name).convert("RGB" if channels == 3 else "L")
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point pixels; convert it to 8 or 16 bits first")
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; straight to RGB, Pillow warns about the alpha
    try:
        return image.convert("RGB" if channels == 3 else "L")
    except ValueError as error:
        raise ImageError(
            f"{name} has pixels of mode {image.mode}, which Pillow cannot convert ({error})"
        ) from error


def source_name(source: Any, index: int | None = None) -> str:
    """What to call `source` in an error: its path, or its place in the list."""
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    what = f"image of {len(source)} bytes" if isinstance(source, bytes) else "image"
    return what if index is None else f"{what} at index {index}"


def _open(source: Source, name: str) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, (str, os.PathLike, bytes)):
            Image.preinit()  # a format that is not loaded yet makes `open` load every plugin there is
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        else:
            kind = type(source).__name__
            raise ImageError(f"{name} is a {kind}; give a path, bytes, a Pillow image or an array")
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels")
        image.load()
        return image
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check the path") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder; give an image file") from None
    except PermissionError:
        raise ImageError(f"{name} may not be read; check its permissions") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name} is too large to decode safely: {error}; shrink it under {MAX_PIXELS} pixels"
        ) from None
    except (UnidentifiedImageError, KeyError):
        raise ImageError(f"{name} is {_what(source)}; convert it to PNG or JPEG") from None
    except _DAMAGE as error:
        raise ImageError(f"{name} is corrupt or truncated ({error}); replace the file") from None


def _what(source: Source) -> str:
    empty = source == b"" if isinstance(source, bytes) else Path(str(source)).stat().st_size == 0
    return "empty" if empty else "not an image in a format that is read here"


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGE:
        orientation = 1
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _sixteen_bits(image: Image.Image, name: str) -> np.ndarray:
    """A mode "I" or "I;16" image as uint16; Pillow's own conversion would clip it to white."""
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageError(
            f"{name} has values from {values.min()} to {values.max()}; convert it to 8 or 16 bits"
        )
    return values.astype(np.uint16)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    what = f"{name}: array of shape {array.shape} and dtype {array.dtype}"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ImageError(f"{what} is not an image; give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # round(value / 257)
    if array.dtype != np.uint8:
        raise ImageError(f"{what} is not uint8; scale it to 0..255 and convert it with .astype('uint8')")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ImageError(f"{what} is too large; shrink it under {MAX_PIXELS} pixels")
    return Image.fromarray(np.ascontiguousarray(array))
