"""From a split to batches: in order for scoring, shuffled and augmented for training.

Training batch k of an epoch draws from streams keyed by (seed, epoch, k), or by the image, so it does not
depend on the batches before it: an epoch resumed half-way goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cveff.data.augment import Augmentation, erase, generator, mirror, mix, normalize, shift
from cveff.errors import DataError
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.preprocess import preprocess

if TYPE_CHECKING:
    from cveff.data.dataset import Split

# First parts of the random streams' keys, one a purpose.
_ORDER, _FLIP, _BATCH, _CROP = 1, 2, 3, 4


def evaluation_batches(
    split: Split, spec: InputSpec, batch_size: int = 64, limit: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """See `Split.evaluation_batches`."""
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; give 1 or more")
    count = len(split) if limit is None else min(limit, len(split))
    targets = np.full(len(split), -1, np.int64) if split.targets is None else split.targets
    pixels = split.pixels(spec) if count == len(split) else None
    for begin in range(0, count, batch_size):
        end = min(begin + batch_size, count)
        if pixels is not None:
            images = pixels[begin:end]
        else:
            images = preprocess([split.source(index) for index in range(begin, end)], spec)
        yield images, targets[begin:end]


def training_batches(
    split: Split,
    spec: InputSpec,
    batch_size: int,
    augmentation: Augmentation,
    *,
    num_classes: int,
    seed: int,
    epoch: int,
    start: int = 0,
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """See `Split.training_batches`."""
    if split.targets is None:
        raise DataError(f"split {split.name!r} has no labels; training needs them")
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; give 1 or more")
    if len(split) == 0:
        raise DataError(f"split {split.name!r} has no images to train on")
    if augmentation.mixes and split.targets.max() >= num_classes:
        raise DataError(
            f"split {split.name!r} has class {split.targets.max()}, the model only {num_classes} classes"
        )
    order = generator(_ORDER, seed, epoch).permutation(len(split))
    coins = generator(_FLIP, seed).integers(0, 2, len(split))
    pixels = split.pixels(spec)
    assert pixels is not None
    for step in range(start, split.num_training_batches(batch_size)):
        indices = order[step * batch_size : (step + 1) * batch_size]
        random = generator(_BATCH, seed, epoch, step)
        images = pixels[indices]
        if augmentation.crop_padding:
            images = shift(images, augmentation.crop_padding, random)
        if augmentation.flip == "alternating":
            images = mirror(images, (coins[indices] + epoch) % 2 == 1)
        elif augmentation.flip == "random":
            images = mirror(images, random.random(len(images)) < 0.5)
        batch = normalize(images, spec)
        targets = torch.from_numpy(split.targets[indices])
        if augmentation.erasing:
            erase(batch, augmentation.erasing, random)
        if augmentation.mixes:
            batch, targets = mix(batch, targets, augmentation, num_classes, random)
        yield batch, targets
