"""The cache gives back what was computed for the very image, survives a torn write, and knows its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cveff.compress.teacher_cache import LogitsCache
from cveff.errors import CheckpointError

IMAGES = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Counting:
    """Sums of pixels as two logits, and how many images were computed."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.count += len(images)
        return torch.stack([images.sum((1, 2, 3)), images.square().sum((1, 2, 3))], 1)


def test_images_are_computed_once_in_whatever_order_and_layout(tmp_path: Path) -> None:
    compute, cache = Counting(), LogitsCache(tmp_path / "logits.bin", "a", 2)
    first = cache.through(IMAGES, compute)
    assert torch.equal(first, Counting()(IMAGES))
    order = torch.tensor([3, 0, 5])
    assert torch.equal(cache.through(IMAGES[order], compute), first[order])
    assert torch.equal(cache.through(IMAGES.to(memory_format=torch.channels_last), compute), first)
    assert compute.count == 6
    reopened = LogitsCache(tmp_path / "logits.bin", "a", 2)
    assert torch.equal(reopened.through(IMAGES, compute), first)
    assert compute.count == 6


def test_a_pixel_more_is_another_image() -> None:
    compute, cache = Counting(), LogitsCache(None, "a", 2)
    cache.through(IMAGES, compute)
    changed = IMAGES.clone()
    changed[2, 0, 0, 0] += 1
    assert torch.equal(cache.through(changed, compute)[2], compute(changed)[2])
    assert len(cache) == 7


def test_a_torn_write_loses_only_the_last_entry(tmp_path: Path) -> None:
    path = tmp_path / "logits.bin"
    first = LogitsCache(path, "a", 2).through(IMAGES, Counting())
    path.write_bytes(path.read_bytes()[:-3])
    cache = LogitsCache(path, "a", 2)
    assert len(cache) == 5
    assert torch.equal(cache.through(IMAGES, Counting()), first)
    assert len(LogitsCache(path, "a", 2)) == 6


def test_another_identity_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "logits.bin"
    LogitsCache(path, "a", 2).through(IMAGES, Counting())
    assert len(LogitsCache(path, "b", 2)) == 0


def test_a_path_that_cannot_be_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be read or written"):
        LogitsCache(tmp_path / "file" / "logits.bin", "a", 2)
