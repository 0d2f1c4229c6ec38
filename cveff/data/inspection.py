"""Decoding every image of a split once, at loading: which are bad, how large and how grey, and their digests.

What was found is remembered for large splits, so that the next command does not decode all again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from cveff.data import inspection_cache
from cveff.data.dataset import OnBadImage, Split
from cveff.data.decoding import parallel_map, read
from cveff.data.report import BadImage
from cveff.errors import ImageError
from cveff.progress import Progress, Silent

_GREY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Inspection:
    """What decoding every image of a split found.

    Attributes:
        good: (N,) bool: which images decode.
        sizes: (N, 2) int64 height and width; zeros where bad.
        grey: (N,) bool: stored as grey.
        digests: (N,) uint64 hash of size and decoded pixels; equal images have equal digests.
        bad_images: the others, with the reason.
    """

    good: np.ndarray
    sizes: np.ndarray
    grey: np.ndarray
    digests: np.ndarray
    bad_images: tuple[BadImage, ...]


def inspect(split: Split, progress: Progress | None = None) -> Inspection:
    """Decode every image of a split in full."""
    count = len(split)
    found = np.zeros((count, 4), np.uint64)  # height, width, grey, digest: a row of zeros is a bad image
    fingerprints = inspection_cache.fingerprints(split)
    if fingerprints is not None:
        found = inspection_cache.recall(split, fingerprints)
    unknown = np.flatnonzero(found[:, 0] == 0)
    bad = []
    results = parallel_map(lambda index: _inspect_one(split, index), (int(index) for index in unknown))
    tracked = (progress or Silent()).track(results, f"Checking {split.name} images", len(unknown))
    for index, result in zip(unknown, tracked, strict=True):
        if isinstance(result, str):
            bad.append(BadImage(split.image_name(int(index)), result))
        else:
            found[index] = result
    if fingerprints is not None and len(unknown) > len(bad):
        inspection_cache.remember(split, fingerprints, found)
    sizes = found[:, :2].astype(np.int64)
    return Inspection(sizes[:, 0] > 0, sizes, found[:, 2] > 0, found[:, 3].copy(), tuple(bad))


def raise_or_keep(bad: Sequence[BadImage], on_bad_image: OnBadImage) -> None:
    """Apply the policy for unreadable files.

    Raises:
        ImageError: there are some and the policy is "error"; the first five are named.
    """
    if not bad or on_bad_image == "skip":
        return
    shown = "; ".join(image.reason for image in bad[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    files = "1 file is" if len(bad) == 1 else f"{len(bad)} files are"
    raise ImageError(
        f"{files} no readable image: {shown}{more}. Replace or remove, or leave such files out with "
        "on_bad_image='skip' (--on-bad-image skip)"
    )


def digest(pixels: np.ndarray) -> int:
    """Hash of an image's size and RGB or grey values, 64 bits."""
    hashed = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8)
    hashed.update(repr(pixels.shape).encode())
    return int.from_bytes(hashed.digest(), "little")


def _inspect_one(split: Split, index: int) -> tuple[int, int, bool, int] | str:
    """Height, width, whether grey, digest; or why the image is bad."""
    try:
        image = read(split, index, 3)
    except ImageError as error:
        return str(error)
    source = split.source(index)
    if isinstance(source, np.ndarray):
        grey = source.ndim == 2 or source.shape[2] == 1
    else:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as header:
            grey = header.mode in _GREY_MODES
    return image.height, image.width, grey, digest(np.asarray(image))
