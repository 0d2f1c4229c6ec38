"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), from their binary version.

The Python version is pickled and never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cveff.data.memory import MemorySplit
from cveff.errors import DataError

RECORDS = 10_000
"""Images in each file of CIFAR-10, and the unit of CIFAR-100's."""

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Cifar:
    """One of the two sets, as its binary archive holds it."""

    name: str
    url: str
    md5: str
    folder: str
    pickled_folder: str
    train: tuple[str, ...]
    test: str
    labels_file: str
    num_classes: int
    records: tuple[int, int]  # in each training file and in the test file, in units of RECORDS
    label_bytes: int  # the last one is the class; CIFAR-100 has its superclass before it

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that is read."""
        return (*self.train, self.test, self.labels_file)


CIFAR10 = Cifar(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    pickled_folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
    labels_file="batches.meta.txt",
    num_classes=10,
    records=(1, 1),
    label_bytes=1,
)
CIFAR100 = Cifar(
    name="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    pickled_folder="cifar-100-python",
    train=("train.bin",),
    test="test.bin",
    labels_file="fine_label_names.txt",
    num_classes=100,
    records=(5, 1),
    label_bytes=2,
)


def read_cifar(cifar: Cifar, folder: Path) -> tuple[MemorySplit, MemorySplit, tuple[str, ...]]:
    """Training split, test split and class names.

    Raises:
        DataError: a file is missing, of a wrong length, or has a class out of range.
    """
    labels = _read_labels(cifar, folder / cifar.labels_file)
    train = [_read_file(cifar, folder / name, cifar.records[0]) for name in cifar.train]
    images, targets = (np.concatenate(parts) for parts in zip(*train, strict=True))
    test_images, test_targets = _read_file(cifar, folder / cifar.test, cifar.records[1])
    return MemorySplit("train", images, targets), MemorySplit("test", test_images, test_targets), labels


def _read_file(cifar: Cifar, path: Path, units: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        raw = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; get {cifar.url} again") from error
    record = cifar.label_bytes + _PIXELS
    expected = units * RECORDS * record
    if len(raw) != expected:
        raise DataError(f"{path} has {len(raw)} bytes instead of {expected}; get {cifar.url} again")
    rows = raw.reshape(-1, record)
    targets = rows[:, cifar.label_bytes - 1]
    if targets.max() >= cifar.num_classes:
        raise DataError(
            f"{path} has class {targets.max()}, past {cifar.num_classes - 1}; get {cifar.url} again"
        )
    planes = rows[:, cifar.label_bytes :].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), targets.astype(np.int64)


def _read_labels(cifar: Cifar, path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="ascii").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; get {cifar.url} again") from error
    if len(names) != cifar.num_classes:
        raise DataError(
            f"{path} has {len(names)} names instead of {cifar.num_classes}; get {cifar.url} again"
        )
    return names
