"""Checks every data set passes at loading: bad images, classes, balance, duplicates between splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cveff.data.dataset import Data, OnBadImage, Split
from cveff.data.inspection import digest, inspect, raise_or_keep
from cveff.data.memory import MemorySplit
from cveff.data.report import BadImage, DataReport
from cveff.errors import DataError
from cveff.progress import Progress

IMBALANCE = 10
"""Ratio of the largest to the smallest training class past which a warning is given."""

FEW_IMAGES = 10
"""Scoring images of a class below which a warning is given."""


def check_labels(name: str, labels: Sequence[str]) -> None:
    """Raise DataError unless there are at least two classes."""
    if len(labels) < 2:
        found = f"only one class, {labels[0]!r}" if labels else "no classes"
        raise DataError(f"{name} has {found}; classification needs two or more, each in a folder of its own")


def check_classes(where: str, targets: np.ndarray, labels: Sequence[str]) -> None:
    """Raise DataError naming the classes without a single image, or a target that has no class."""
    if len(targets) and (targets.min() < 0 or targets.max() >= len(labels)):
        wrong = int(targets.min()) if targets.min() < 0 else int(targets.max())
        raise DataError(f"{where} has class number {wrong}, but there are {len(labels)} class names")
    counts = np.bincount(targets, minlength=len(labels))
    empty = [labels[int(index)] for index in np.flatnonzero(counts == 0)]
    if empty:
        shown = ", ".join(repr(label) for label in empty[:10]) + (", …" if len(empty) > 10 else "")
        one = len(empty) == 1
        raise DataError(
            f"{where}: {'class' if one else 'classes'} {shown} {'has' if one else 'have'} no images; "
            f"add some, or remove {'it' if one else 'them'} from every split"
        )


def keep_readable(
    split: Split, bad: Sequence[BadImage], on_bad_image: OnBadImage, progress: Progress | None
) -> tuple[Split, np.ndarray, tuple[BadImage, ...]]:
    """Decode every image of a split and leave out the unreadable ones, or refuse them.

    Args:
        bad: files already known to be no images.

    Returns:
        the split with `native_size` and `channels` known; its images' digests, (N,) uint64; all bad images.

    Raises:
        ImageError: some files are bad and the policy is "error".
        DataError: no image is left.
    """
    found = inspect(split, progress)
    everything = (*bad, *found.bad_images)
    raise_or_keep(everything, on_bad_image)
    if not found.good.any():
        raise DataError(f"split {split.name!r} has no readable image ({len(everything)} bad files)")
    kept = split.subset(np.flatnonzero(found.good))
    sizes = found.sizes[found.good]
    height, width = (int(side) for side in sizes[0])
    kept.native_size = (height, width) if (sizes == sizes[0]).all() else None
    kept.channels = 1 if found.grey[found.good].all() else 3
    return kept, found.digests[found.good], everything


def check(
    data: Data,
    digests: Mapping[str, np.ndarray] | None = None,
    bad_images: Sequence[BadImage] = (),
    warnings: Sequence[str] = (),
) -> Data:
    """Add the report to a data set.

    Args:
        digests: by split name, what `keep_readable` returned; computed here for splits in memory.
        bad_images, warnings: what finding the files brought up.

    Raises:
        DataError: fewer than two classes, or a class without a training image.
    """
    check_labels(data.name, data.labels)
    splits = {split.name: split for split in (data.train, data.val, data.test) if split is not None}
    for split in splits.values():
        if split is data.train:
            check_classes(f"{data.name} ({split.name})", split.class_indices(), data.labels)
    known = dict(digests or {})
    for name, split in splits.items():
        if name not in known and isinstance(split, MemorySplit):
            known[name] = np.array([digest(image) for image in split.images], np.uint64)
    duplicates: list[tuple[str, str]] = []
    conflicts: list[tuple[str, str]] = []
    notes = list(warnings)
    if bad_images:
        files = "1 file was" if len(bad_images) == 1 else f"{len(bad_images)} files were"
        notes.append(f"{files} left out as no readable image")
    notes += _balance_warnings(data)
    if data.train is not None:
        for name, split in splits.items():
            if split is data.train:
                continue
            pairs = find_duplicates(known[data.train.name], known[name])
            names = [(data.train.image_name(int(a)), split.image_name(int(b))) for a, b in pairs]
            differ = data.train.class_indices()[pairs[:, 0]] != split.class_indices()[pairs[:, 1]]
            duplicates += names
            conflicts += [pair for pair, different in zip(names, differ, strict=True) if different]
            if names:
                images = "1 image" if len(names) == 1 else f"{len(names)} images"
                notes.append(
                    f"{images} of {name} also in train (e.g. {names[0][1]} = {names[0][0]}): "
                    f"accuracy on {name} is flattered"
                )
    if conflicts:
        notes.append(
            f"{len(conflicts)} of these duplicates carry different labels "
            f"(e.g. {conflicts[0][0]}, {conflicts[0][1]})"
        )
    report = DataReport(
        counts={name: _counts(split, data.labels) for name, split in splits.items()},
        bad_images=tuple(bad_images),
        duplicates=tuple(duplicates),
        conflicts=tuple(conflicts),
        warnings=tuple(notes),
    )
    return replace(data, report=report)


def find_duplicates(train: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each image of `other` with an equal in train: (index in train, index in other), (P, 2) int64."""
    values, first = np.unique(train, return_index=True)
    place = np.searchsorted(values, other)
    place[place == len(values)] = 0
    found = np.flatnonzero(values[place] == other) if len(values) else np.empty(0, np.int64)
    return np.stack([first[place[found]], found], axis=1).astype(np.int64)


def _counts(split: Split, labels: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(split.class_indices(), minlength=len(labels))
    return {label: int(count) for label, count in zip(labels, counts, strict=True)}


def _balance_warnings(data: Data) -> list[str]:
    notes = []
    if data.train is not None:
        counts = np.bincount(data.train.class_indices(), minlength=len(data.labels))
        most, least = int(counts.argmax()), int(counts.argmin())
        if counts[most] > IMBALANCE * counts[least]:
            notes.append(
                f"training classes are unbalanced: {data.labels[most]!r} has {counts[most]} images, "
                f"{data.labels[least]!r} only {counts[least]}"
            )
    scored = data.evaluation
    counts = np.bincount(scored.class_indices(), minlength=len(data.labels))
    few = [data.labels[index] for index in np.flatnonzero(counts < FEW_IMAGES)]
    if few:
        shown = ", ".join(repr(label) for label in few[:5]) + (", …" if len(few) > 5 else "")
        notes.append(
            f"{scored.name} has fewer than {FEW_IMAGES} images of {len(few)} of {len(data.labels)} classes "
            f"({shown}): its accuracy is a rough figure ({len(scored)} images in all)"
        )
    return notes
