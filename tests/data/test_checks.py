"""What loading reports: duplicates, conflicts, imbalance; how images are chosen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cveff.data import Data, MemorySplit, calibration_images, channel_statistics, load
from cveff.data.checks import check, find_duplicates
from cveff.data.sampling import calibration_indices, stratified_split
from cveff.errors import DataError
from cveff.runtime.input_spec import InputSpec

RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def memory(name: str, images: np.ndarray, targets: list[int]) -> MemorySplit:
    return MemorySplit(name, images, np.array(targets))


def test_duplicates_and_conflicts_between_splits_are_found() -> None:
    train, val = noise(40, 5, 5, 1), noise(20, 5, 5, 1)
    val[3], val[11] = train[7], train[30]
    data = Data("x", ("a", "b"), memory("train", train, [0, 1] * 20), memory("val", val, [1] * 10 + [1] * 10))
    report = check(data).report
    assert report.duplicates == (("train[7]", "val[3]"), ("train[30]", "val[11]"))
    assert report.conflicts == (("train[30]", "val[11]"),)  # 30 is class 0 in train
    assert any("2 images of val also in train" in warning for warning in report.warnings)
    assert json.loads(json.dumps(report.to_json()))["num_duplicates"] == 2


def test_duplicates_are_found_by_pixels_not_bytes(tmp_path: Path) -> None:
    for split, suffix in (("train", "png"), ("val", "bmp")):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(3):
                values = noise(6, 6, 3) if index else np.full((6, 6, 3), ord(label), np.uint8)
                Image.fromarray(values).save(tmp_path / split / label / f"{index}.{suffix}")
    assert load(tmp_path).report.duplicates == (
        ("train/a/0.png", "val/a/0.bmp"),
        ("train/b/0.png", "val/b/0.bmp"),
    )


def test_find_duplicates_agrees_with_comparing_all() -> None:
    train, other = (RANDOM.integers(0, 30, size).astype(np.uint64) for size in (20, 25))
    expected = [
        (int(np.flatnonzero(train == value)[0]), index) for index, value in enumerate(other) if value in train
    ]
    assert find_duplicates(train, other).tolist() == [list(pair) for pair in expected]
    assert find_duplicates(train[:0], other).shape == (0, 2)


def test_different_splits_raise_no_warning() -> None:
    train = memory("train", noise(40, 5, 5, 1), [0, 1] * 20)
    assert (
        check(Data("x", ("a", "b"), train, memory("val", noise(20, 5, 5, 1), [0, 1] * 10))).report.warnings
        == ()
    )


def test_imbalance_and_few_scored_images_are_told() -> None:
    train = memory("train", noise(63, 5, 5, 1), [0] * 60 + [1] * 3)
    warnings = check(
        Data("x", ("a", "b"), train, memory("val", noise(12, 5, 5, 1), [0] * 11 + [1]))
    ).report.warnings
    assert any("'a' has 60 images, 'b' only 3" in warning for warning in warnings)
    assert any("fewer than 10 images of 1 of 2 classes ('b')" in warning for warning in warnings)


def test_targets_and_labels_must_fit() -> None:
    val = memory("val", noise(4, 5, 5, 1), [0, 1, 0, 1])
    with pytest.raises(DataError, match="class number 2, but there are 2"):
        check(Data("x", ("a", "b"), memory("train", noise(3, 5, 5, 1), [0, 1, 2]), val))
    with pytest.raises(DataError, match="class 'c' has no images"):
        check(Data("x", ("a", "b", "c"), memory("train", noise(3, 5, 5, 1), [0, 1, 1]), val))
    with pytest.raises(DataError, match="no classes"):
        check(Data("x", (), None, val))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("sizes", "count"), [([50, 50], 10), ([7, 100, 13], 30), ([1, 2, 40], 5), ([1, 1], 1)]
)
def test_a_stratified_split_is_disjoint_complete_and_fair(sizes: list[int], count: int, seed: int) -> None:
    targets = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    kept, aside = stratified_split(targets, count, seed)
    assert sorted([*kept.tolist(), *aside.tolist()]) == list(range(len(targets)))
    given = np.bincount(targets[aside], minlength=len(sizes))
    assert (np.bincount(targets[kept], minlength=len(sizes)) >= 1).all()
    if min(sizes) > 2:
        assert len(aside) == count
        assert (np.abs(given - np.array(sizes) * count / sum(sizes)) <= 1).all()


def test_calibration_is_balanced_and_seeded() -> None:
    split = memory("train", noise(100, 5, 5, 1), [0] * 80 + [1] * 15 + [2] * 5)
    chosen = calibration_indices(split, 21, seed=0)
    assert np.bincount(split.class_indices()[chosen]).tolist() == [8, 8, 5]
    assert len(set(chosen.tolist())) == 21
    assert chosen.tolist() == calibration_indices(split, 21, seed=0).tolist()
    assert chosen.tolist() != calibration_indices(split, 21, seed=1).tolist()
    assert calibration_indices(split, 1000, seed=0).tolist() == list(range(100))


def test_calibration_images_are_the_exported_graphs_input() -> None:
    split = memory("train", noise(30, 9, 7, 3), [0, 1, 2] * 10)
    spec = InputSpec((5, 5), 3)
    images = calibration_images(split, spec, 6, seed=0)
    assert images.shape == (6, 5, 5, 3) and images.dtype == np.uint8
    everything = np.concatenate([batch for batch, _ in split.evaluation_batches(spec)])
    np.testing.assert_array_equal(images, everything[calibration_indices(split, 6, seed=0)])
    with pytest.raises(DataError, match="calibration images is 0"):
        calibration_images(split, spec, 0, seed=0)
    with pytest.raises(DataError, match="no images to calibrate"):
        calibration_images(split.subset([]), spec, 3, seed=0)


def test_calibration_of_unlabelled_images() -> None:
    split = MemorySplit("images", noise(30, 5, 5, 3), None)
    assert calibration_images(split, InputSpec((5, 5)), 7, seed=0).shape == (7, 5, 5, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_statistics_are_those_of_the_pixels(channels: int) -> None:
    images = noise(50, 6, 7, channels) // np.array([1, 2, 3], np.uint8)[:channels]
    mean, std = channel_statistics(MemorySplit("train", images, None))
    pixels = images.reshape(-1, channels) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0), atol=5e-5)
    np.testing.assert_allclose(std, pixels.std(axis=0), atol=5e-5)
    assert len(channel_statistics(MemorySplit("train", images, None), channels=1)[0]) == 1


def test_channel_statistics_of_constant_images_can_still_divide() -> None:
    mean, std = channel_statistics(MemorySplit("train", np.full((3, 4, 4, 1), 51, np.uint8), None))
    assert mean == (0.2,) and std == (round(1 / 255, 4),)
