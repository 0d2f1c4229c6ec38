"""Decoding training images batch by batch in torch's worker processes, for splits that stay on disk."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cveff.data.augment import random_resized_crop
from cveff.data.augmentation import Augmentation
from cveff.data.dataset import Split
from cveff.data.decoding import parallel_map, prepare, read
from cveff.data.randomness import generator
from cveff.errors import CveffError, DataError, InputSizeError
from cveff.runtime.input_spec import InputSpec

_CROP = 21


def decoded_batches(
    split: Split,
    batches: Sequence[np.ndarray],
    spec: InputSpec,
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    num_workers: int,
) -> Iterator[np.ndarray]:
    """Read batches of images from their sources, randomly cropped when `augmentation.min_scale` < 1.

    Args:
        batches: the indices of each batch.
        num_workers: processes; 0 decodes in threads of this one. Without effect on the images: each one's
            crop depends on (seed, epoch, index).

    Yields:
        (B, H, W, C) uint8 at `spec.size`.

    Raises:
        InputSizeError, ImageError: as `runtime.preprocess`, from this process.
    """
    if num_workers < 0:
        raise DataError(f"num_workers is {num_workers}; give 0 or more")
    decoder = _Decoder(split, spec, augmentation.min_scale, seed, epoch)
    if num_workers == 0:
        results = parallel_map(decoder.__getitem__, (int(index) for batch in batches for index in batch))
        loader: Iterable[list[Any]] = ([next(results) for _ in batch] for batch in batches)
    else:
        loader = _started(
            decoder,
            [batch.tolist() for batch in batches],
            num_workers,
        )
    for images in loader:
        for image in images:
            if isinstance(image, CveffError):
                raise image
        yield np.stack(images)


def _started(decoder: _Decoder, batches: list[list[int]], num_workers: int) -> Iterator[list[Any]]:
    """Start the workers; SIGCHLD's handler is left as it was.

    torch installs one that tells at once when a worker died, and leaves it there. Once OpenVINO is loaded, a process
    crashes when that handler runs at the end of any child process, such as the one that measures memory. Without it
    torch still finds a dead worker, within five seconds.
    """
    loader = DataLoader(
        decoder,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_they_are,
        # Its own generator: the loader would otherwise draw from torch's global one, whose state a
        # resumed run has to find unchanged.
        generator=torch.Generator().manual_seed(0),
    )
    is_main = threading.current_thread() is threading.main_thread()
    earlier = signal.getsignal(signal.SIGCHLD) if is_main else None
    try:
        return iter(loader)
    finally:
        if earlier is not None:
            signal.signal(signal.SIGCHLD, earlier)


class _Decoder(Dataset[Any]):
    def __init__(self, split: Split, spec: InputSpec, min_scale: float, seed: int, epoch: int) -> None:
        self.split = split
        self.spec = spec
        self.min_scale = min_scale
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> np.ndarray | CveffError:
        """One image, or the error, which torch would otherwise wrap in a worker's traceback."""
        try:
            if self.min_scale == 1:
                return prepare(self.split, index, self.spec)
            image = read(self.split, index, self.spec.channels)
            height, width = self.spec.size
            if not self.spec.enlarge and (image.height < height or image.width < width):
                raise InputSizeError(
                    f"{self.split.image_name(index)} {image.width}×{image.height} is smaller than the "
                    f"model's {width}×{height} input; use larger images, or an input with enlarge=True"
                )
            random = generator(_CROP, self.seed, self.epoch, index)
            return random_resized_crop(image, self.spec, self.min_scale, random)
        except CveffError as error:
            return error


def _as_they_are(images: list[Any]) -> list[Any]:
    return images
