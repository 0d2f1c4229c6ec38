"""Sets known by name: where they are looked for, and files that are not what they should be."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
import torchvision.datasets.utils

from cveff.data import cifar, load, named
from cveff.data.idx import read_idx
from cveff.errors import DataError


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder: Path, zipped: bool = False, train: int = 60, test: int = 20) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for images, labels, count in (
        (named.FASHION_MNIST_FILES[0], named.FASHION_MNIST_FILES[1], train),
        (named.FASHION_MNIST_FILES[2], named.FASHION_MNIST_FILES[3], test),
    ):
        arrays = (
            (images, random.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            (labels, np.arange(count, dtype=np.uint8) % 10),
        )
        for name, array in arrays:
            content = idx_bytes(array)
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Debian package, no network, and a cache of its own."""

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("no network here")

    monkeypatch.setattr(named, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)
    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", refuse)
    monkeypatch.setenv("CVEFF_DATA", str(tmp_path / "given"))


def test_digits_come_whole_in_three_splits() -> None:
    data = load("digits")
    assert data.train is not None and data.test is not None and data.evaluation is data.test
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    assert data.num_classes == 10 and data.labels == tuple("0123456789")
    assert data.train.native_size == (8, 8) and data.train.channels == 1
    pixels = np.concatenate([split.images for split in (data.train, data.val, data.test)])  # type: ignore[attr-defined]
    assert pixels.max() == 255 and len(np.unique(pixels)) == 17


def test_the_seed_moves_val_and_never_test() -> None:
    first, second = load("digits", seed=1), load("digits", seed=2)
    assert first.test is not None and second.test is not None
    np.testing.assert_array_equal(first.test.images, second.test.images)  # type: ignore[attr-defined]
    assert not np.array_equal(first.val.images, second.val.images)  # type: ignore[attr-defined]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", ["given", "given/fashion-mnist", "debian"])
def test_fashion_mnist_is_found_in_every_place(
    offline: None, tmp_path: Path, place: str, zipped: bool
) -> None:
    write_fashion(tmp_path / place, zipped)
    data = load("fashion-mnist")
    assert data.train is not None and data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (54, 6, 20)
    assert data.labels[9] == "Ankle boot" and data.train.native_size == (28, 28)


def test_fashion_mnist_is_downloaded_last(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(root: Path, download: bool) -> None:
        assert download
        write_fashion(root / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    assert len(load("fashion-mnist").val) == 6


def test_fashion_mnist_nowhere_names_all_three_places(offline: None, tmp_path: Path) -> None:
    with pytest.raises(DataError) as info:
        load("fashion-mnist")
    message = str(info.value)
    for part in (
        "$CVEFF_DATA",
        str(tmp_path / "given"),
        "dataset-fashion-mnist",
        "torchvision",
        "no network here",
    ):
        assert part in message


def test_fashion_mnist_without_the_variable_says_so(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CVEFF_DATA")
    monkeypatch.setattr(named, "cache_folder", lambda: Path("/nonexistent/cache"))
    with pytest.raises(DataError, match=r"\$CVEFF_DATA \(not set\).*/nonexistent/cache"):
        load("fashion-mnist")


def test_fashion_mnist_whose_files_do_not_belong_together(offline: None, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    write_fashion(folder)
    labels = folder / named.FASHION_MNIST_FILES[1]
    labels.write_bytes(idx_bytes(np.zeros(59, np.uint8)))
    with pytest.raises(DataError, match=r"has 60 images, .* 59 labels"):
        load("fashion-mnist")
    labels.write_bytes(idx_bytes(np.full(60, 10, np.uint8)))
    with pytest.raises(DataError, match="has class 10"):
        load("fashion-mnist")


@pytest.mark.skipif(
    not named.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian package dataset-fashion-mnist is not installed"
)
def test_the_real_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CVEFF_DATA", raising=False)
    data = load("fashion-mnist")
    assert data.train is not None and data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (55_000, 5_000, 10_000)
    assert set(data.report.counts["val"].values()) == {500}
    assert set(data.report.counts["test"].values()) == {1_000}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x08", "not an IDX file"),
        (idx_bytes(np.zeros((2, 2), np.uint8)), "with 1 axes"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x02ab", "unsigned bytes"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "not an IDX file"),
        (idx_bytes(np.zeros(9, np.uint8))[:-1], r"should hold 9 bytes of shape \(9,\) but holds only 8"),
        (idx_bytes(np.zeros(9, np.uint8)) + b"x", "but holds more"),
        (struct.pack(">BBBBI", 0, 0, 8, 1, 2**32 - 1), "should hold 4294967295 bytes"),
        (gzip.compress(idx_bytes(np.zeros(900, np.uint8)), mtime=0)[:-9], "cannot read"),
        (b"\x1f\x8b" + bytes(30), "cannot read"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path, 1)
    with pytest.raises(DataError, match="labels"):
        read_idx(path, 1)


def test_idx_refuses_sizes_no_set_has_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, *[2**31] * 3))
    with pytest.raises(DataError, match="declares"):
        read_idx(path, 3)
    with pytest.raises(DataError, match="cannot read"):
        read_idx(tmp_path / "nowhere", 3)


def test_idx_returns_what_was_written(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    (tmp_path / "a").write_bytes(idx_bytes(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "a", 3), array)


# CIFAR


def write_cifar(kind: cifar.Cifar, folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    written = {}
    for name, units in [(name, kind.records[0]) for name in kind.train] + [(kind.test, kind.records[1])]:
        count = units * cifar.RECORDS
        planes = random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = (np.arange(count) % kind.num_classes).astype(np.uint8)[:, None]
        superclass = np.full_like(labels, 255)
        columns = [superclass, labels] if kind.label_bytes == 2 else [labels]
        rows = np.concatenate([*columns, planes.reshape(count, -1)], axis=1)
        (folder / name).write_bytes(rows.tobytes())
        written[name] = planes
    (folder / kind.labels_file).write_text("\n".join(f"c{i}" for i in range(kind.num_classes)) + "\n\n")
    return written


@pytest.mark.parametrize("kind", [cifar.CIFAR10, cifar.CIFAR100], ids=lambda kind: kind.name)
def test_cifar_is_read_from_the_binary_version(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: cifar.Cifar
) -> None:
    monkeypatch.setattr(cifar, "RECORDS", 100)
    written = write_cifar(kind, tmp_path / "given" / kind.folder)
    data = load(kind.name)
    assert data.train is not None and data.test is not None
    assert len(data.train) + len(data.val) == 500 and len(data.test) == 100
    assert data.train.native_size == (32, 32) and data.train.channels == 3 and data.labels[3] == "c3"
    for index in (0, 57):
        assert data.test.class_indices()[index] == index % kind.num_classes
        np.testing.assert_array_equal(
            np.asarray(data.test.image(index)), written[kind.test][index].transpose(1, 2, 0)
        )


def test_cifar_files_of_wrong_length_or_class_are_refused(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "RECORDS", 20)
    folder = tmp_path / "given" / "cifar10"
    write_cifar(cifar.CIFAR10, folder)
    load("cifar10")
    good = (folder / "test_batch.bin").read_bytes()
    for content, message in (
        (good[:-1], "61459 bytes instead of 61460"),
        (b"\x0a" + good[1:], "has class 10"),
    ):
        (folder / "test_batch.bin").write_bytes(content)
        with pytest.raises(DataError, match=message):
            load("cifar10")
    (folder / "test_batch.bin").write_bytes(good)
    (folder / "batches.meta.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="2 names instead of 10"):
        load("cifar10")


def test_pickled_cifar_is_never_opened(offline: None, tmp_path: Path) -> None:
    folder = tmp_path / "given" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(DataError, match=r"Python version, whose pickled files are not read.*binary version"):
        load("cifar10")


def test_imagenet_nowhere(offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"imagenet was not found: looked in .*given/imagenet"):
        load("imagenet")
    monkeypatch.delenv("CVEFF_DATA")
    with pytest.raises(DataError, match="not set"):
        load("imagenet")


def test_loading_needs_no_torch() -> None:
    code = "import sys, cveff.data as d; d.load('digits'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
