"""Laws of the random changes, each of which could fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cveff.data.augment import erase, mirror, mix, normalize, random_resized_crop, shift
from cveff.data.augmentation import Augmentation
from cveff.data.randomness import generator
from cveff.errors import DataError
from cveff.runtime.input_spec import InputSpec


def images_of(count: int, height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_shifted_image_is_a_window_of_the_reflected_one(channels: int) -> None:
    images = images_of(40, 6, 9, channels)
    shifted = shift(images, 2, generator(1))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    places = set()
    for image, source in zip(shifted, padded, strict=True):
        hits = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if (source[top : top + 6, left : left + 9] == image).all()
        ]
        assert len(hits) == 1
        places.add(hits[0])
    assert len(places) > 10


def test_a_shift_wider_than_the_image_is_refused() -> None:
    with pytest.raises(DataError, match=r"crop_padding is 4.*4×9"):
        shift(images_of(2, 4, 9, 1), 4, generator(0))


def test_mirror_flips_only_the_chosen_and_twice_is_nothing() -> None:
    images, chosen = images_of(3, 4, 5, 3), np.array([True, False, True])
    once = mirror(images, chosen)
    np.testing.assert_array_equal(once[0], images[0, :, ::-1])
    np.testing.assert_array_equal(once[1], images[1])
    np.testing.assert_array_equal(mirror(once, chosen), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_is_the_formula_in_channels_last(channels: int) -> None:
    images = images_of(2, 5, 7, channels)
    spec = InputSpec((5, 7), channels, (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels])
    batch = normalize(images, spec)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
    expected = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    assert torch.equal(batch, expected)
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 3])
def test_erasing_fills_one_rectangle_of_the_stated_area(channels: int) -> None:
    batch = torch.full((200, channels, 28, 28), 50.0).contiguous(memory_format=torch.channels_last)
    erase(batch, 0.5, generator(3))
    erased = batch != 50
    assert 70 < erased.any(dim=1).flatten(1).any(dim=1).sum() < 130
    for mask in erased[:, 0]:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert mask.sum() == rows.sum() * columns.sum()  # a full rectangle
        if mask.any():
            assert 0.01 < mask.float().mean() < 0.33
    assert torch.equal(erased[:, 0], erased[:, -1])  # the same in every channel
    noise = batch[erased]
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05


def test_erasing_with_probability_nought_or_one() -> None:
    batch = torch.full((20, 1, 9, 9), 50.0)
    erase(batch, 0.0, generator(0))
    assert (batch == 50).all()
    erase(batch, 1.0, generator(0))
    assert (batch != 50).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_pixels_and_targets_have_the_same_shares(settings: dict[str, float]) -> None:
    # Image i is constant i, so a pixel mean shows how much of which image is left.
    for seed in range(20):
        batch = torch.arange(8.0).view(8, 1, 1, 1).repeat(1, 3, 10, 12)
        mixed, soft = mix(batch.clone(), torch.arange(8), Augmentation(**settings), 8, generator(seed))
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(8))
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), soft @ torch.arange(8.0), rtol=1e-5, atol=1e-5)
        assert (soft >= 0).all() and ((soft > 0).sum(dim=1) <= 2).all()


def test_mixing_two_images_of_one_class_gives_that_class() -> None:
    _, soft = mix(torch.rand(4, 1, 5, 5), torch.full((4,), 2), Augmentation(mixup=1.0), 3, generator(1))
    torch.testing.assert_close(soft, torch.tensor([0.0, 0.0, 1.0]).expand(4, 3))


def test_resized_crop_of_a_constant_image_is_constant_and_of_the_whole_is_a_resize() -> None:
    spec = InputSpec((8, 6), 3)
    plain = Image.new("RGB", (50, 31), (10, 200, 30))
    assert (random_resized_crop(plain, spec, 0.1, generator(0)) == [10, 200, 30]).all()
    # Far longer than 4:3, so no random box of the full area fits and the central one is taken.
    long = Image.fromarray(images_of(1, 10, 100, 3)[0])
    expected = long.crop((43, 0, 56, 10)).resize((6, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(random_resized_crop(long, spec, 1.0, generator(0)), np.asarray(expected))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": "sideways"}, "flip is 'sideways'"),
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"crop_padding": 1.5}, "crop_padding is 1.5"),
        ({"min_scale": 0.0}, "min_scale is 0.0"),
        ({"min_scale": 1.1}, "min_scale is 1.1"),
        ({"erasing": 1.5}, "erasing is 1.5"),
        ({"mixup": -0.1}, "mixup is -0.1"),
        ({"cutmix": float("inf")}, "cutmix is inf"),
        ({"mixup": float("nan")}, "mixup is nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Augmentation(**settings)  # type: ignore[arg-type]


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(DataError, match="0 or more, not -1"):
        generator(1, -1)
