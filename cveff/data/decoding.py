"""Decoding many images, in order, by several threads: Pillow releases the interpreter's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from cveff.runtime.input_spec import InputSpec
from cveff.runtime.preprocess import decode, fit

if TYPE_CHECKING:
    from cveff.data.dataset import Split

T = TypeVar("T")


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
