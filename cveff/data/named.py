"""Data sets known by name. Each finder says where it looked when it finds nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

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

NUM_VAL = 5_000
"""Images set aside from the official training split of Fashion-MNIST and CIFAR."""


def cache_folder() -> Path:
    """Where downloads go: `$CVEFF_DATA`, else `~/.cache/cveff`."""
    given = os.environ.get("CVEFF_DATA")
    return Path(given) if given else Path.home() / ".cache" / "cveff"


def digits(seed: int, val_fraction: float) -> Data:
    """scikit-learn's 1,797 grey 8×8 images of digits; a fixed fifth is the test split."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = np.rint(loaded.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = MemorySplit("digits", images, loaded.target)
    rest, test = stratified_split(everything.targets, round(0.2 * len(images)), seed=0)
    return _with_val(
        "digits",
        everything.subset(rest),
        everything.subset(test, "test"),
        tuple("0123456789"),
        seed,
        round(val_fraction * len(rest)),
    )


def fashion_mnist(seed: int, val_fraction: float) -> Data:
    """Fashion-MNIST (arXiv:1708.07747): 60,000 + 10,000 grey 28×28 images, 10 classes; 5,000 of the first are val."""
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


NAMED: dict[str, Callable[[int, float], Data]] = {"digits": digits, "fashion-mnist": fashion_mnist}


def _with_val(
    name: str, train: MemorySplit, test: MemorySplit, labels: tuple[str, ...], seed: int, num_val: int
) -> Data:
    assert train.targets is not None
    kept, aside = stratified_split(train.targets, num_val, seed)
    return Data(name, labels, train.subset(kept, "train"), train.subset(aside, "val"), test)


def _find_fashion_mnist() -> Path:
    given = os.environ.get("CVEFF_DATA")
    places = [Path(given) / "fashion-mnist", Path(given)] if given else []
    cached = cache_folder() / "FashionMNIST" / "raw"
    for folder in [*places, DEBIAN_FASHION_MNIST, cached]:
        if all(_one_of(folder, name).is_file() for name in FASHION_MNIST_FILES):
            return folder
    reason = _download_fashion_mnist(cache_folder())
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


def _download_fashion_mnist(root: Path) -> str | None:
    """None when the files are there; else why they are not."""
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(root, download=True)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _one_of(folder: Path, name: str) -> Path:
    """The plain file if it is there, else the compressed one."""
    plain = folder / name
    return plain if plain.is_file() else folder / f"{name}.gz"
