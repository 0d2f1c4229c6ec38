"""`Data` and `Split`: what training, measuring and deploying know about images, wherever these live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from cveff.data.augmentation import Augmentation
from cveff.data.report import DataReport
from cveff.data.share import Share
from cveff.errors import DataError
from cveff.runtime.input_spec import InputSpec

if TYPE_CHECKING:
    from torch import Tensor

OnBadImage = Literal["error", "skip"]
ImageSource = Path | bytes | np.ndarray

MEMORY_LIMIT = 1 << 30
"""Bytes of uint8 pixels up to which a split is kept in memory at the model's input size."""


class Split(ABC):
    """An ordered set of images with or without labels.

    Attributes:
        name: "train", "val", "test" or what `subset` was told.
        targets: (N,) int64 class of each image; None where there are no labels.
        native_size: (height, width) when all images share it, else None.
        channels: 1 when every image is grey, else 3.
    """

    def __init__(
        self, name: str, targets: np.ndarray | None, native_size: tuple[int, int] | None, channels: int
    ) -> None:
        self.name = name
        self.targets = None if targets is None else np.ascontiguousarray(targets, dtype=np.int64)
        self.native_size = native_size
        self.channels = channels
        self._pixels: tuple[InputSpec, np.ndarray] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def source(self, index: int) -> ImageSource:
        """The image as `runtime.preprocess` takes it."""

    @abstractmethod
    def subset(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> Split:
        """The images at `indices`, in that order, as a split of their own."""

    def class_indices(self) -> np.ndarray:
        """`targets`, (N,) int64, for work that needs them.

        Raises:
            DataError: the split has no labels.
        """
        if self.targets is None:
            raise DataError(f"split {self.name!r} has no labels; this work needs labelled images")
        return self.targets

    def image_name(self, index: int) -> str:
        """What to call an image in a message or a report."""
        return f"{self.name}[{index}]"

    def place(self) -> str | None:
        """Where the images lie, as a key; None for images that are not on disk."""
        return None

    def stamp(self, index: int) -> str | None:
        """A text that changes when the image on disk does, cheap to make; None for images that are not."""
        return None

    def image(self, index: int) -> Image.Image:
        """The picture, upright, in its natural number of channels.

        Raises:
            ImageError: the file is no longer readable.
        """
        from cveff.data.decoding import read

        return read(self, index, self.channels)

    def evaluation_batches(
        self, spec: InputSpec, batch_size: int = 64, limit: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images in order, exactly as `runtime.preprocess` makes them.

        Args:
            limit: only the first `limit` images.

        Yields:
            images (B, H, W, C) uint8 at `spec.size`, and targets (B,) int64 (-1 where there are no labels).

        Raises:
            InputSizeError: an image is smaller than the input and `spec.enlarge` is off.
            ImageError: a file is no longer readable.
        """
        from cveff.data.batches import evaluation_batches

        return evaluation_batches(self, spec, batch_size, limit)

    def training_batches(
        self,
        spec: InputSpec,
        batch_size: int,
        augmentation: Augmentation,
        *,
        num_classes: int,
        seed: int,
        epoch: int,
        start: int = 0,
        num_workers: int = 0,
        chosen: Iterable[np.ndarray] | None = None,
        share: Share = Share(),  # noqa: B008  (frozen)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of shuffled, augmented batches; each depends on (seed, epoch, step) alone.

        Args:
            start: leave out the first `start` batches; the others are the same as without.
            num_workers: processes that decode, for splits that do not fit in memory; no effect on results.
            chosen: indices of each batch from `start` to the epoch's end, in place of a shuffled epoch's. Of a split
                in memory, each is taken just before its batch is made.
            share: the part of each batch that this process trains on; an image is augmented as in the whole batch.

        Yields:
            images (B, C, H, W) float32, normalised, channels last in memory; targets (B,) int64, or soft
            targets (B, num_classes) float32 under mixup or cutmix.

        Raises:
            DataError: the split has no labels, or the settings do not fit.
            InputSizeError: an image is smaller than the input and `spec.enlarge` is off.
        """
        from cveff.data.batches import training_batches

        return training_batches(
            self,
            spec,
            batch_size,
            augmentation,
            num_classes=num_classes,
            seed=seed,
            epoch=epoch,
            start=start,
            num_workers=num_workers,
            chosen=chosen,
            share=share,
        )

    def num_training_batches(self, batch_size: int) -> int:
        """Batches of an epoch: the last partial one is dropped, unless it is the only one."""
        return max(1, len(self) // batch_size)

    def pixels(self, spec: InputSpec) -> np.ndarray | None:
        """All images at the model's input, (N, H, W, C) uint8, or None where they would not fit in memory.

        Made once and kept until asked for another `spec`. Do not write to it.
        """
        if len(self) * spec.size[0] * spec.size[1] * spec.channels > MEMORY_LIMIT:
            return None
        if self._pixels is None or self._pixels[0] != spec:
            self._pixels = (spec, self._make_pixels(spec))
        return self._pixels[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # worker processes decode for themselves

    def _make_pixels(self, spec: InputSpec) -> np.ndarray:
        from cveff.data.decoding import prepare_many

        return prepare_many(self, range(len(self)), spec)


@dataclass(frozen=True)
class Data:
    """A data set: named classes and up to three splits.

    Attributes:
        labels: one name a class, in the order of the targets.
        train: None for sets that are only for scoring.
        val: for choosing (epochs, candidates).
        test: the official test split where there is one: only for the figures that users read.
        report: what loading found.
    """

    name: str
    labels: tuple[str, ...]
    train: Split | None
    val: Split
    test: Split | None = None
    report: DataReport = field(default_factory=DataReport)

    @property
    def evaluation(self) -> Split:
        """The split whose figures are reported: `test` if there is one, else `val`."""
        return self.test if self.test is not None else self.val

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.labels)
