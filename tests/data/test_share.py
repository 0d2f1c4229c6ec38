"""Ranks' parts of a batch are the batch: each image once, and prepared as if one process did it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cveff.data import Augmentation, load
from cveff.data.dataset import Split
from cveff.data.share import Share
from cveff.errors import DataError
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec((8, 8), 1, mean=(0.3,), std=(0.35,))
RECIPE = Augmentation(flip="random", crop_padding=1, erasing=0.5)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 12])
@pytest.mark.parametrize("mixes", [False, True])
def test_parts_are_the_batch_and_mixed_images_stay_together(world: int, count: int, mixes: bool) -> None:
    parts = [Share(rank, world).positions(count, mixes) for rank in range(world)]
    assert sorted(np.concatenate(parts)) == list(range(count))
    assert min(map(len, parts)) == Share(0, world).smallest(count, mixes)
    assert max(map(len, parts)) - min(map(len, parts)) <= (2 if mixes else 1)
    if mixes:
        for part in parts:
            np.testing.assert_array_equal(count - 1 - part[::-1], part)


@pytest.mark.parametrize(
    "augmentation",
    [
        RECIPE,
        Augmentation(flip="alternating", erasing=1.0, mixup=0.5, cutmix=1.0),
        Augmentation(min_scale=0.5),
    ],
)
def test_a_part_is_prepared_as_in_the_whole_batch(augmentation: Augmentation) -> None:
    split = load("digits", seed=0).train
    assert split is not None
    whole = batches(split, augmentation)
    for rank in range(3):
        share = Share(rank, 3)
        for (images, targets), (part, own) in zip(whole, batches(split, augmentation, share), strict=True):
            places = share.positions(len(images), augmentation.mixes)
            assert torch.equal(part, images[places]) and torch.equal(own, targets[places])


def batches(
    split: Split,
    augmentation: Augmentation,
    share: Share = Share(),  # noqa: B008  (frozen)
    **options: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    settings = {"num_classes": 10, "seed": 1, "epoch": 2, "share": share, **options}
    return list(split.subset(np.arange(50)).training_batches(SPEC, 13, augmentation, **settings))  # type: ignore[arg-type]


def test_every_image_of_shards_is_seen_once_by_some_rank_and_worker(tmp_path: Path) -> None:
    for shard in range(3):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as archive:
            for index in range(8):
                add(archive, f"{shard}{index}.png", png(shard * 8 + index))
                add(archive, f"{shard}{index}.cls", str(index % 2).encode())
    with tarfile.open(tmp_path / "val-0.tar", "w") as archive:
        for index in range(2):
            add(archive, f"{index}.png", png(100 + index))
            add(archive, f"{index}.cls", str(index).encode())
    train = load(tmp_path, seed=0).train
    assert train is not None and len(train) == 24
    seen: list[int] = []
    for rank in range(2):
        plain = Augmentation(flip="none", min_scale=0.999999)  # not from memory: workers read the shards
        for images, _ in train.training_batches(
            SPEC, 8, plain, num_classes=2, seed=0, epoch=0, num_workers=2, share=Share(rank, 2)
        ):
            mean, std = SPEC.mean[0], SPEC.std[0]
            seen += torch.round((images[:, 0, 4, 4] * std + mean) * 255).int().tolist()
    assert sorted(seen) == list(range(24))


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_rank_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match="rank 2 of 2 is none"):
        Share(2, 2)
