"""From a split to batches: in order for scoring, shuffled and augmented for training.

Training batch k of an epoch draws from streams keyed by (seed, epoch, k), or by the image, so it does not
depend on the batches before it: an epoch resumed half-way goes on bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cveff.data.augment import erase, mirror, mix, normalize, shift
from cveff.data.augmentation import Augmentation
from cveff.data.decoding import parallel_map, prepare
from cveff.data.randomness import generator
from cveff.data.share import Share
from cveff.data.workers import decoded_batches
from cveff.errors import DataError
from cveff.runtime.input_spec import InputSpec

if TYPE_CHECKING:
    from cveff.data.dataset import Split

# First parts of the random streams' keys, one a purpose.
_ORDER, _FLIP, _BATCH = 1, 2, 3


def evaluation_batches(
    split: Split, spec: InputSpec, batch_size: int = 64, limit: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """See `Split.evaluation_batches`."""
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; give 1 or more")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; give 1 or more images, or None for all")
    count = len(split) if limit is None else min(limit, len(split))
    targets = np.full(len(split), -1, np.int64) if split.targets is None else split.targets
    ranges = [(begin, min(begin + batch_size, count)) for begin in range(0, count, batch_size)]
    pixels = split.pixels(spec) if count == len(split) else None
    if pixels is not None:
        for begin, end in ranges:
            yield pixels[begin:end], targets[begin:end]
        return
    prepared = parallel_map(lambda index: prepare(split, index, spec), range(count))
    for begin, end in ranges:
        images = np.empty((end - begin, *spec.size, spec.channels), np.uint8)
        for position in range(end - begin):
            images[position] = next(prepared)
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
    chosen: Iterable[np.ndarray] | None = None,
    share: Share = Share(),  # noqa: B008  (frozen)
) -> Iterator[tuple[Tensor, Tensor]]:
    """See `Split.training_batches`."""
    labels = split.class_indices()
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; give 1 or more")
    if len(split) == 0:
        raise DataError(f"split {split.name!r} has no images to train on")
    if labels.max() >= num_classes and augmentation.mixes:
        raise DataError(f"split {split.name!r} has class {labels.max()}; the model has {num_classes} classes")
    coins = generator(_FLIP, seed).integers(0, 2, len(split))
    steps = range(start, split.num_training_batches(batch_size))
    if chosen is None:
        order = shuffled(len(split), seed, epoch)
        chosen = [order[step * batch_size : (step + 1) * batch_size] for step in steps]
    batches, wanted = itertools.tee(chosen)
    mine = (batch[share.positions(len(batch), augmentation.mixes)] for batch in wanted)
    decoded = _decoded(split, mine, spec, augmentation, seed, epoch, num_workers)
    for step, batch_indices, images in zip(steps, batches, decoded, strict=True):
        # Draws are made for the whole batch: an image's do not depend on how many ranks share the work.
        count, places = len(batch_indices), share.positions(len(batch_indices), augmentation.mixes)
        indices = batch_indices[places]
        random = generator(_BATCH, seed, epoch, step)
        if augmentation.crop_padding:
            images = shift(images, augmentation.crop_padding, random, count, places)
        if augmentation.flip == "alternating":
            images = mirror(images, (coins[indices] + epoch) % 2 == 1)
        elif augmentation.flip == "random":
            images = mirror(images, random.random(count)[places] < 0.5)
        batch = normalize(images, spec)
        targets = torch.from_numpy(labels[indices])
        if augmentation.erasing:
            erase(batch, augmentation.erasing, random, count, places)
        if augmentation.mixes:
            batch, targets = mix(batch, targets, augmentation, num_classes, random)
        yield batch, targets


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's images, (count,) int64."""
    return generator(_ORDER, seed, epoch).permutation(count)


def _decoded(
    split: Split,
    batches: Iterable[np.ndarray],
    spec: InputSpec,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    num_workers: int,
) -> Iterator[np.ndarray]:
    """Batches of (B, H, W, C) uint8: from memory where they fit, except for random resized crops."""
    pixels = split.pixels(spec) if augmentation.min_scale == 1 else None
    if pixels is not None:
        return (pixels[indices] for indices in batches)
    return decoded_batches(
        split, list(batches), spec, augmentation, seed=seed, epoch=epoch, num_workers=num_workers
    )
