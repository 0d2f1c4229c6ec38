"""`FileSplit` and `ShardSplit`: images that stay on disk, read by index.

A shard's members are indexed once by their offsets, so an epoch over shards is shuffled, resumed and
split exactly as one over files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cveff.data.dataset import ImageSource, Split
from cveff.data.decoding import printable
from cveff.errors import ImageError


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

    def place(self) -> str | None:
        """The folder."""
        return repr(os.fsencode(self.root.absolute()))

    def stamp(self, index: int) -> str | None:
        """Path, size and time of the last change."""
        path = self.root / self.names[index]
        found = path.stat()
        return f"{os.fsencode(path.absolute())!r} {found.st_size} {found.st_mtime_ns}"

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

    def place(self) -> str | None:
        """The first shard."""
        return repr(os.fsencode(self.shards[0].absolute()))

    def stamp(self, index: int) -> str | None:
        """The image's place, and its shard's size and time of the last change."""
        shard, offset, size = (int(value) for value in self.places[index])
        path = self.shards[shard]
        found = path.stat()
        return f"{os.fsencode(path.absolute())!r} {found.st_size} {found.st_mtime_ns} {offset} {size}"

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
