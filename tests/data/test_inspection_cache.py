"""A large set is decoded once; a changed, damaged or foreign memory is not believed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cveff.data import inspection, inspection_cache
from cveff.data.disk import FileSplit
from cveff.data.inspection import inspect


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileSplit:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inspection_cache, "SMALLEST", 5)
    for index in range(12):
        values = np.random.default_rng(index).integers(0, 256, (6, 5 + index % 2), dtype=np.uint8)
        Image.fromarray(values).convert("RGB" if index % 3 else "L").save(tmp_path / f"{index}.png")
    (tmp_path / "12.png").write_bytes(b"")
    return FileSplit("train", tmp_path, [f"{index}.png" for index in range(13)], None)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices that were decoded."""
    seen: list[int] = []
    real = inspection._inspect_one

    def count(split: FileSplit, index: int):
        seen.append(index)
        return real(split, index)

    monkeypatch.setattr(inspection, "_inspect_one", count)
    return seen


def assert_same(a: inspection.Inspection, b: inspection.Inspection) -> None:
    for name in ("good", "sizes", "grey", "digests"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.bad_images == b.bad_images and len(a.bad_images) == 1


def memory_of(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache" / "cveff" / "inspected").iterdir()
    return path


def test_the_second_time_only_bad_images_are_decoded(split: FileSplit, decoded: list[int]) -> None:
    first = inspect(split)
    assert sorted(decoded) == list(range(13)) and first.grey.any() and not first.grey.all()
    decoded.clear()
    assert_same(inspect(split), first)
    assert decoded == [12]
    decoded.clear()
    order = [12, *range(11, -1, -1)]  # recalled by image, not by position
    np.testing.assert_array_equal(inspect(split.subset(order)).digests, first.digests[order])
    assert decoded == [0]


def test_a_changed_image_is_decoded_again(split: FileSplit, decoded: list[int], tmp_path: Path) -> None:
    first = inspect(split)
    decoded.clear()
    Image.new("L", (20, 30)).save(tmp_path / "4.png")
    second = inspect(split)
    assert sorted(decoded) == [4, 12]
    assert second.sizes[4].tolist() == [30, 20] and second.digests[4] != first.digests[4]


def test_a_damaged_memory_is_not_used(split: FileSplit, decoded: list[int], tmp_path: Path) -> None:
    first = inspect(split)
    path = memory_of(tmp_path)
    for content in (b"", b"hello", path.read_bytes()[:100]):
        path.write_bytes(content)
        decoded.clear()
        assert_same(inspect(split), first)
        assert len(decoded) == 13


def test_another_pillow_decodes_again(
    split: FileSplit, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect(split)
    decoded.clear()
    monkeypatch.setattr(inspection_cache, "_VERSION", "another")
    inspect(split)
    assert len(decoded) == 13


@pytest.mark.skipif(os.name != "posix", reason="needs /dev/null")
def test_a_cache_that_cannot_be_written_changes_nothing(
    split: FileSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = inspect(split)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert_same(inspect(split), expected)


def test_small_sets_leave_nothing_behind(
    split: FileSplit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inspection_cache, "SMALLEST", 100)
    inspect(split)
    assert not (tmp_path / "cache").exists()
