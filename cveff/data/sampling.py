"""Choosing images: stratified splits, calibration samples, the statistics that normalise."""

from __future__ import annotations

import numpy as np

from cveff.data.dataset import Split
from cveff.data.decoding import prepare_many, read
from cveff.data.randomness import generator
from cveff.errors import DataError
from cveff.runtime.input_spec import InputSpec

_SPLIT, _CALIBRATION = 11, 12


def stratified_split(targets: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Set `count` images aside, as near as whole images allow to the same share of every class.

    Args:
        targets: (N,) int64.

    Returns:
        indices kept and indices set aside, each sorted; together every index once. Each class keeps at
        least one image, and gives at least one where `count` allows and it has two.
    """
    classes, sizes = np.unique(targets, return_counts=True)
    exact = sizes * (count / len(targets))
    given = np.floor(exact).astype(np.int64)
    # Largest remainders first, then the seed-independent class order, make the total exact.
    for position in np.argsort(given - exact, kind="stable")[: count - int(given.sum())]:
        given[position] += 1
    for position in np.flatnonzero((given == 0) & (sizes > 1)):
        richest = int(np.argmax(given))
        if given[richest] > 1:
            given[richest] -= 1
            given[position] += 1
    given = np.minimum(given, sizes - 1)
    random = generator(_SPLIT, seed)
    aside = np.sort(
        np.concatenate(
            [
                random.permutation(np.flatnonzero(targets == name))[:number]
                for name, number in zip(classes, given, strict=True)
            ]
        )
    )
    return np.setdiff1d(np.arange(len(targets)), aside), aside


def calibration_indices(split: Split, count: int, seed: int) -> np.ndarray:
    """Indices of `count` images, as many of each class as can be; all when there are no more than `count`."""
    random = generator(_CALIBRATION, seed)
    if split.targets is None:
        return np.sort(random.permutation(len(split))[:count])
    order = random.permutation(len(split))
    targets = split.targets[order]
    turn = np.empty(len(order), np.int64)  # the how-manieth of its class each image is
    for name in np.unique(targets):
        members = np.flatnonzero(targets == name)
        turn[members] = np.arange(len(members))
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])


def calibration_images(split: Split, spec: InputSpec, count: int, seed: int) -> np.ndarray:
    """A class-balanced sample, as the exported graph takes it.

    Args:
        count: how many; a smaller split gives all it has.

    Returns:
        (count, H, W, C) uint8.

    Raises:
        DataError: `count` is not positive, or the split is empty.
    """
    if count < 1:
        raise DataError(f"number of calibration images is {count}; give 1 or more")
    if len(split) == 0:
        raise DataError(f"split {split.name!r} has no images to calibrate with")
    return prepare_many(split, calibration_indices(split, count, seed), spec)


def channel_statistics(
    split: Split, channels: int | None = None, limit: int = 10_000
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels, scaled to [0, 1], for `InputSpec.mean` and `std`.

    Args:
        channels: 1 or 3; by default the split's own.
        limit: larger splits are represented by this many images, evenly spaced.

    Returns:
        mean and std, one value a channel, rounded to 4 decimals; std is at least 1/255.
    """
    if len(split) == 0:
        raise DataError(f"split {split.name!r} has no images")
    channels = channels or split.channels
    counts = np.zeros((channels, 256), np.int64)
    for index in np.unique(np.linspace(0, len(split) - 1, min(limit, len(split))).astype(np.int64)):
        pixels = np.asarray(read(split, int(index), channels)).reshape(-1, channels)
        for channel in range(channels):
            counts[channel] += np.bincount(pixels[:, channel], minlength=256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(axis=1))
    return (
        tuple(round(float(value), 4) for value in mean),
        tuple(round(max(float(value), 1 / 255), 4) for value in std),
    )
