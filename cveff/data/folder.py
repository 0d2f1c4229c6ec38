"""Image folders: `train/ val/ [test/]` with a folder for each class, or one tree of classes split by seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cveff.data.checks import check, check_classes, check_labels, keep_readable
from cveff.data.dataset import Data, OnBadImage, Split
from cveff.data.decoding import printable
from cveff.data.disk import FileSplit
from cveff.data.imagenet import class_names, flat_targets
from cveff.data.inspection import raise_or_keep
from cveff.data.report import BadImage
from cveff.data.sampling import stratified_split
from cveff.data.walk import files_in, find_images, is_image_name, subfolders
from cveff.errors import DataError
from cveff.progress import Progress

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
"""Folder names, in lower case, that mean a split."""


@dataclass(frozen=True)
class _Found:
    """One split's files before any was opened."""

    classes: tuple[str, ...]
    names: list[str]
    targets: np.ndarray
    bad: list[BadImage]


def load_folder(
    root: str | Path,
    *,
    seed: int = 0,
    on_bad_image: OnBadImage = "error",
    val_fraction: float = 0.1,
    progress: Progress | None = None,
) -> Data:
    """Load a folder of images; every image is decoded once, to be sure.

    Args:
        root: holds `train/`, perhaps `val/` (`valid/`, `validation/`) and `test/`; or the class folders.
        seed, val_fraction: choose the validation images where there is no such folder.

    Raises:
        DataError: no images, one class only, an empty class, or splits whose classes differ.
        ImageError: a file is no readable image, under `on_bad_image="error"`.
    """
    root = Path(root)
    layout, warnings = _find_splits(root)
    if not layout:
        found = {"all": _scan(root, "", None)}
    else:
        train = _scan(root, layout["train"], None) if "train" in layout else None
        found = {"train": train} if train is not None else {}
        for name in ("val", "test"):
            if name in layout:
                found[name] = _scan(root, layout[name], train.classes if train is not None else None)
    classes = _common_classes(root, found)
    check_labels(str(root), classes)
    bad = [image for part in found.values() for image in part.bad]
    raise_or_keep(bad, on_bad_image)
    for name, part in found.items():
        check_classes(_where(root, layout, name), part.targets, classes)
    splits: dict[str, Split] = {}
    digests: dict[str, np.ndarray] = {}
    for name, part in found.items():
        split = FileSplit(name, root, part.names, part.targets)
        splits[name], digests[name], unreadable = keep_readable(split, (), on_bad_image, progress)
        bad += unreadable
        check_classes(_where(root, layout, name), splits[name].class_indices(), classes)
    _set_aside_val(splits, digests, seed, val_fraction)
    name = root.resolve().name
    val = splits.get("val", splits.get("test"))
    assert val is not None
    test = splits.get("test") if "val" in splits else None
    data = Data(name, class_names(root, classes), splits.get("train"), val, test)
    return check(data, digests, bad, warnings)


def load_images(
    folder: str | Path, on_bad_image: OnBadImage = "error", progress: Progress | None = None
) -> Split:
    """All images anywhere under a folder, without labels: for calibration and agreement.

    Raises:
        DataError: the folder is missing or holds no images.
        ImageError: a file is no readable image, under `on_bad_image="error"`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give a folder of images")
    names, bad = find_images(root, "")
    if not names and not bad:
        raise DataError(f"{root} holds no images; give a folder of images")
    if not names:
        raise DataError(f"{root} holds no images, only files such as {bad[0].name}; give a folder of images")
    split, _, _ = keep_readable(FileSplit("images", root, names, None), bad, on_bad_image, progress)
    return split


def _find_splits(root: Path) -> tuple[dict[str, str], list[str]]:
    """Which folders are splits ({} when `root` holds the classes), and warnings about the others."""
    folders = subfolders(root)
    if not folders:
        if any(is_image_name(name) for name in files_in(root)):
            raise DataError(
                f"{root} has images but no class folders; put each class's images in a folder of its own "
                "(for images without labels see --calibration)"
            )
        raise DataError(f"{root} has no images; give a folder with train/ and val/, or one folder a class")
    named = [name for name in folders if name.lower() in SPLIT_FOLDERS]
    # A class may be called "train": a split holds folders (or, ImageNet's flat val, stands beside train).
    has_folders = [name for name in named if subfolders(root / name)]
    if not has_folders:
        if len(named) == len(folders):
            raise DataError(
                f"{root / named[0]} has no class folders; put each class's images in a folder of its own"
            )
        return {}, []
    layout: dict[str, str] = {}
    for name in named:
        split = SPLIT_FOLDERS[name.lower()]
        if split in layout:
            raise DataError(f"{root} has both {layout[split]}/ and {name}/ for {split}; keep one")
        layout[split] = name
    others = [printable(name) for name in folders if name not in named]
    warnings = [f"folders beside the splits were not read: {', '.join(others)}"] if others else []
    return layout, warnings


def _scan(root: Path, folder: str, train_classes: tuple[str, ...] | None) -> _Found:
    """Find the files of one split."""
    path = root / folder
    classes = tuple(subfolders(path))
    loose = [name for name in files_in(path) if is_image_name(name)]
    if not classes and loose:
        relative = [f"{folder}/{name}" for name in loose]
        if train_classes is None:
            raise DataError(f"{path} has images but no class folders; put each class's images in a folder")
        return _Found(train_classes, relative, flat_targets(root, path, loose, train_classes), [])
    names: list[str] = []
    targets: list[int] = []
    bad = [
        BadImage(printable(name), f"{printable(str(path / name))} lies outside every class folder")
        for name in loose
    ]
    for index, label in enumerate(classes):
        if printable(label) != label:
            raise DataError(
                f"the class folder {printable(str(path / label))} has a name that is no UTF-8; rename it"
            )
        here, other = find_images(root, f"{folder}/{label}" if folder else label)
        names += here
        targets += [index] * len(here)
        bad += other
    return _Found(classes, names, np.array(targets, np.int64), bad)


def _common_classes(root: Path, found: dict[str, _Found]) -> tuple[str, ...]:
    """The classes all splits share.

    Raises:
        DataError: a class folder is in one split and not in another.
    """
    first = next(iter(found))
    for name, part in found.items():
        only_first = sorted(set(found[first].classes) - set(part.classes))
        only_here = sorted(set(part.classes) - set(found[first].classes))
        if only_first or only_here:
            missing = [f"only in {first}: {', '.join(only_first[:10])}"] if only_first else []
            missing += [f"only in {name}: {', '.join(only_here[:10])}"] if only_here else []
            raise DataError(
                f"{root}: the classes of {first} and {name} differ ({'; '.join(missing)}); make them equal"
            )
    return found[first].classes


def _set_aside_val(
    splits: dict[str, Split], digests: dict[str, np.ndarray], seed: int, val_fraction: float
) -> None:
    """Split val off train (or off the one tree there is), in place."""
    whole = "all" if "all" in splits else "train"
    if "val" in splits or whole not in splits:
        return
    everything, known = splits.pop(whole), digests.pop(whole)
    kept, aside = split_off_val(everything, seed, val_fraction)
    for name, indices in (("train", kept), ("val", aside)):
        splits[name] = everything.subset(indices, name)
        digests[name] = known[indices]


def split_off_val(split: Split, seed: int, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices that stay for training and those set aside, by class.

    Raises:
        DataError: there are too few images to set any aside.
    """
    targets = split.class_indices()
    kept, aside = stratified_split(targets, max(1, round(val_fraction * len(targets))), seed)
    if len(aside) == 0:
        raise DataError(
            f"{len(split)} images are too few to set some aside for validation; add images or a val/ folder"
        )
    return kept, aside


def _where(root: Path, layout: dict[str, str], name: str) -> str:
    return str(root / layout[name]) if name in layout else str(root)
