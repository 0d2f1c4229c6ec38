"""`FileSplit` and `ShardSplit`: images that stay on disk, read by index; and the workers that decode them.

A shard's members are indexed once by their offsets, so an epoch over shards is shuffled, resumed and
split exactly as one over files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cveff.data.augment import Augmentation, generator, random_resized_crop
from cveff.data.dataset import ImageSource, Split
from cveff.data.decoding import prepare, printable, read
from cveff.errors import CveffError, DataError, ImageError, InputSizeError
from cveff.runtime.input_spec import InputSpec

_CROP = 21


class PackedNames:
    """Many file names in two arrays: millions cost little, and worker processes share them unwritten."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *(len(name) for name in encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


class FileSplit(Split):
    """Image files under one folder.

    Args:
        root: the folder.
        names: paths relative to it.
        targets: (N,) integers, or None.
        native_size, channels: see `Split`; what inspection found.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        names: Sequence[str],
        targets: np.ndarray | None,
        native_size: tuple[int, int] | None = None,
        channels: int = 3,
    ) -> None:
        super().__init__(name, targets, native_size, channels)
        self.root = root
        self.names = PackedNames(names)

    def __len__(self) -> int:
        return len(self.names)

    def source(self, index: int) -> ImageSource:
        """The file's path."""
        return self.root / self.names[index]

    def image_name(self, index: int) -> str:
        """The file's path relative to the data set's folder."""
        return printable(self.names[index])

    def subset(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> FileSplit:
        """The images at `indices`, in that order, as a split of their own."""
        chosen = np.asarray(indices, dtype=np.int64)
        targets = None if self.targets is None else self.targets[chosen]
        names = [self.names[int(index)] for index in chosen]
        return FileSplit(name or self.name, self.root, names, targets, self.native_size, self.channels)


class ShardSplit(Split):
    """Images inside uncompressed tar files.

    Args:
        shards: the tar files.
        names: each image's name inside its shard.
        places: (N, 3) int64: which shard, the offset of the image's first byte, its number of bytes.
        targets: (N,) integers.
    """

    def __init__(
        self,
        name: str,
        shards: tuple[Path, ...],
        names: Sequence[str],
        places: np.ndarray,
        targets: np.ndarray | None,
        native_size: tuple[int, int] | None = None,
        channels: int = 3,
    ) -> None:
        super().__init__(name, targets, native_size, channels)
        self.shards = shards
        self.names = PackedNames(names)
        self.places = places

    def __len__(self) -> int:
        return len(self.names)

    def source(self, index: int) -> ImageSource:
        """The image file's bytes.

        Raises:
            ImageError: the shard can no longer be read.
        """
        shard, offset, size = (int(value) for value in self.places[index])
        try:
            with self.shards[shard].open("rb") as handle:
                handle.seek(offset)
                return handle.read(size)
        except OSError as error:
            raise ImageError(f"cannot read {self.shards[shard]}: {error.strerror or error}") from error

    def image_name(self, index: int) -> str:
        """The shard's name and the image's name inside it."""
        return printable(f"{self.shards[int(self.places[index, 0])].name}/{self.names[index]}")

    def subset(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> ShardSplit:
        """The images at `indices`, in that order, as a split of their own."""
        chosen = np.asarray(indices, dtype=np.int64)
        targets = None if self.targets is None else self.targets[chosen]
        names = [self.names[int(index)] for index in chosen]
        return ShardSplit(
            name or self.name,
            self.shards,
            names,
            self.places[chosen],
            targets,
            self.native_size,
            self.channels,
        )


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
        num_workers: processes; 0 decodes in this one. Without effect on the images: each one's crop
            depends on (seed, epoch, index).

    Yields:
        (B, H, W, C) uint8 at `spec.size`.

    Raises:
        InputSizeError, ImageError: as `runtime.preprocess`, from this process.
    """
    if num_workers < 0:
        raise DataError(f"num_workers is {num_workers}; give 0 or more")
    loader = DataLoader(
        _Decoder(split, spec, augmentation.min_scale, seed, epoch),
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=num_workers,
        collate_fn=_as_they_are,
        # Its own generator: the loader would otherwise draw from torch's global one, whose state a
        # resumed run has to find unchanged.
        generator=torch.Generator().manual_seed(0),
    )
    for images in loader:
        for image in images:
            if isinstance(image, CveffError):
                raise image
        yield np.stack(images)


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
