"""Data sets known by name. Each finder says where it looked when it finds nothing."""

from __future__ import annotations

import os
import socket
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cveff.data.checks import check
from cveff.data.cifar import CIFAR10, CIFAR100, Cifar, read_cifar
from cveff.data.dataset import Data
from cveff.data.idx import read_idx
from cveff.data.memory import MemorySplit
from cveff.data.sampling import stratified_split
from cveff.errors import DataError

FASHION_MNIST_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts the files."""

DOWNLOAD_TIMEOUT = 20.0
"""Seconds without an answer after which a download is given up."""

NUM_VAL = 5_000
"""Images set aside from the official training split of Fashion-MNIST and CIFAR."""


def cache_folder() -> Path:
    """Where downloads go: `$CVEFF_DATA`, else `~/.cache/cveff`."""
    given = os.environ.get("CVEFF_DATA")
    return Path(given) if given else Path.home() / ".cache" / "cveff"


def digits(seed: int = 0, val_fraction: float = 0.1) -> Data:
    """scikit-learn's 1,797 grey 8×8 images of digits; a fixed fifth is the test split, whatever the seed."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = np.rint(loaded.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = MemorySplit("digits", images, loaded.target)
    rest, test = stratified_split(everything.class_indices(), round(0.2 * len(images)), seed=0)
    train, labels = everything.subset(rest), tuple("0123456789")
    count = round(val_fraction * len(train))
    return _with_val("digits", train, everything.subset(test, "test"), labels, seed, count)


def fashion_mnist(seed: int = 0, val_fraction: float = 0.1) -> Data:
    """Fashion-MNIST (arXiv:1708.07747): 60,000 + 10,000 grey 28×28 images in 10 classes.

    5,000 of the 60,000 are val (less, where `val_fraction` says so).

    Raises:
        DataError: it is nowhere; the three places are named. Or its files are damaged.
    """
    folder = _find_fashion_mnist()
    parts = [_one_of(folder, name) for name in FASHION_MNIST_FILES]
    splits = []
    for name, images_path, labels_path in (("train", parts[0], parts[1]), ("test", parts[2], parts[3])):
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels) or len(images) == 0:
            raise DataError(
                f"{images_path} has {len(images)} images, {labels_path} {len(labels)} labels; get both again"
            )
        if labels.max() >= len(FASHION_MNIST_LABELS):
            raise DataError(f"{labels_path} has class {labels.max()}; Fashion-MNIST has 0 to 9")
        splits.append(MemorySplit(name, images[..., None], labels))
    count = min(NUM_VAL, round(val_fraction * len(splits[0])))
    return _with_val("fashion-mnist", splits[0], splits[1], FASHION_MNIST_LABELS, seed, count)


def cifar10(seed: int = 0, val_fraction: float = 0.1) -> Data:
    """CIFAR-10: 50,000 + 10,000 colour 32×32 images in 10 classes; 5,000 of the first are val."""
    return _cifar(CIFAR10, seed, val_fraction)


def cifar100(seed: int = 0, val_fraction: float = 0.1) -> Data:
    """CIFAR-100: 50,000 + 10,000 colour 32×32 images in 100 classes; 5,000 of the first are val."""
    return _cifar(CIFAR100, seed, val_fraction)


NAMED: dict[str, Callable[[int, float], Data]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
}


def find_imagenet() -> Path:
    """The folder of ImageNet below `$CVEFF_DATA`.

    Raises:
        DataError: it is not there.
    """
    given = os.environ.get("CVEFF_DATA")
    places = [Path(given) / place for place in ("imagenet", "ILSVRC/Data/CLS-LOC")] if given else []
    for folder in places:
        if (folder / "train").is_dir() or (folder / "val").is_dir():
            return folder
    looked = " and ".join(str(place) for place in places) if places else "$CVEFF_DATA, which is not set"
    raise DataError(
        f"imagenet was not found: looked in {looked}. It cannot be downloaded without an account: give the "
        "path of a folder with train/ and val/, or set CVEFF_DATA to the folder above one called imagenet"
    )


def _with_val(
    name: str, train: MemorySplit, test: MemorySplit, labels: tuple[str, ...], seed: int, num_val: int
) -> Data:
    kept, aside = stratified_split(train.class_indices(), max(1, num_val), seed)
    return check(Data(name, labels, train.subset(kept, "train"), train.subset(aside, "val"), test))


def _cifar(cifar: Cifar, seed: int, val_fraction: float) -> Data:
    train, test, labels = read_cifar(cifar, _find_cifar(cifar))
    return _with_val(cifar.name, train, test, labels, seed, min(NUM_VAL, round(val_fraction * len(train))))


def _find_cifar(cifar: Cifar) -> Path:
    from torchvision.datasets.utils import download_and_extract_archive

    root = cache_folder()
    places = [root / cifar.folder, root / cifar.name, root / cifar.name / cifar.folder, root]
    for folder in places:
        if all((folder / name).is_file() for name in cifar.files):
            return folder
    pickled = next(
        (
            path
            for path in (root / cifar.pickled_folder, root / cifar.name / cifar.pickled_folder)
            if path.is_dir()
        ),
        None,
    )
    reason = _attempt(lambda: download_and_extract_archive(cifar.url, root, md5=cifar.md5))
    if reason is None:
        return places[0]
    note = f"{pickled} is the Python version, whose pickled files are not read. " if pickled else ""
    raise DataError(
        f"{cifar.name} was not found: no {cifar.folder} in {root} ($CVEFF_DATA, or the cache where that is "
        f"not set), and the download of {cifar.url} failed: {reason}. {note}Unpack the binary version into a "
        "folder and set CVEFF_DATA to it"
    )


def _find_fashion_mnist() -> Path:
    given = os.environ.get("CVEFF_DATA")
    places = [Path(given) / "fashion-mnist", Path(given)] if given else []
    cached = cache_folder() / "FashionMNIST" / "raw"
    for folder in [*places, DEBIAN_FASHION_MNIST, cached]:
        if all(_one_of(folder, name).is_file() for name in FASHION_MNIST_FILES):
            return folder
    from torchvision.datasets import FashionMNIST

    reason = _attempt(lambda: FashionMNIST(cache_folder(), download=True))
    if reason is None:
        return cached
    looked = f"$CVEFF_DATA ({given}, {given}/fashion-mnist)" if given else "$CVEFF_DATA (not set)"
    raise DataError(
        "fashion-mnist was not found. Looked in: "
        f"1. {looked}; "
        f"2. {DEBIAN_FASHION_MNIST} (Debian package dataset-fashion-mnist); "
        f"3. torchvision's download into {cache_folder()}, which failed: {reason}. "
        f"Put {', '.join(FASHION_MNIST_FILES)} (plain or .gz) into a folder and set CVEFF_DATA to it"
    )


def _attempt(download: Callable[[], object]) -> str | None:
    """Run a download: None when it went well, else why not."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(
        DOWNLOAD_TIMEOUT
    )  # urllib would otherwise wait for minutes where nothing answers
    try:
        download()
    except (OSError, RuntimeError, EOFError, tarfile.TarError, zlib.error) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        socket.setdefaulttimeout(before)
    return None


def _one_of(folder: Path, name: str) -> Path:
    """The plain file if it is there, else the compressed one."""
    plain = folder / name
    return plain if plain.is_file() else folder / f"{name}.gz"
