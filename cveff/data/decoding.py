"""Decoding many images, in order, by several threads: Pillow releases the interpreter's lock."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from cveff.data.report import BadImage
from cveff.errors import ImageError
from cveff.progress import Progress, Silent
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.preprocess import decode, fit

if TYPE_CHECKING:
    from cveff.data.dataset import OnBadImage, Split

T = TypeVar("T")

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


def printable(text: str) -> str:
    """Text that can be shown and stored: bytes of a file name that are no UTF-8 appear as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def usable_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel_map(function: Callable[[int], T], indices: Iterable[int]) -> Iterator[T]:
    """`function` of every index, in order, computed ahead by one thread a core.

    Results that wait to be taken are bounded, so a large split does not fill memory.
    """
    threads = usable_cores()
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[T]] = deque()
    try:
        for index in indices:
            waiting.append(pool.submit(function, index))
            if len(waiting) >= 8 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # An abandoned generator may be collected by one of the pool's own threads, which cannot wait for itself.
        pool.shutdown(wait=False, cancel_futures=True)


def read(split: Split, index: int, channels: int) -> Image.Image:
    """`runtime.preprocess.decode` of one image.

    Raises:
        ImageError: it cannot be read; the message names it.
    """
    source = split.source(index)
    return decode(
        source, channels, printable(str(source)) if isinstance(source, Path) else split.image_name(index)
    )


def prepare(split: Split, index: int, spec: InputSpec) -> np.ndarray:
    """One image as `runtime.preprocess.preprocess` makes it, (H, W, C) uint8; errors name the image."""
    return fit(read(split, index, spec.channels), spec, name=split.image_name(index))


def prepare_many(split: Split, indices: Sequence[int] | np.ndarray, spec: InputSpec) -> np.ndarray:
    """Images as `runtime.preprocess.preprocess` makes them, (len(indices), H, W, C) uint8."""
    images = np.empty((len(indices), *spec.size, spec.channels), np.uint8)
    prepared = parallel_map(lambda index: prepare(split, index, spec), (int(index) for index in indices))
    for position, image in enumerate(prepared):
        images[position] = image
    return images


def inspect(split: Split, progress: Progress | None = None) -> Inspection:
    """Decode every image of a split in full."""
    count = len(split)
    good, grey = np.zeros(count, bool), np.zeros(count, bool)
    sizes, digests = np.zeros((count, 2), np.int64), np.zeros(count, np.uint64)
    bad = []
    results = parallel_map(lambda index: _inspect_one(split, index), range(count))
    for index, result in enumerate(
        (progress or Silent()).track(results, f"Checking {split.name} images", count)
    ):
        if isinstance(result, str):
            bad.append(BadImage(split.image_name(index), result))
            continue
        good[index] = True
        sizes[index], grey[index], digests[index] = result
    return Inspection(good, sizes, grey, digests, tuple(bad))


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


def _inspect_one(split: Split, index: int) -> tuple[tuple[int, int], bool, int] | str:
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
    return (image.height, image.width), grey, digest(np.asarray(image))
