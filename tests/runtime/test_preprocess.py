"""The evaluation transform equals timm's (and torchvision's) bit for bit where those define it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cveff.errors import ImageError, InputSizeError
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.preprocess import fit, preprocess

# (height, width): square, odd, tall, wide, one pixel off the crop, exact sizes, smaller than the crop
SIZES = [
    *((64, 64), (65, 63), (33, 47), (101, 37), (37, 101), (32, 32), (33, 32), (32, 33)),
    *((36, 36), (37, 36), (500, 333), (31, 90), (90, 31), (8, 8), (7, 5), (1, 1), (1, 40)),
]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A photograph-like image: smooth waves and noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(rows / (3 + k) + columns / (5 - k) + k) for k in range(3)]
    return Image.fromarray(
        (np.stack(waves, -1) + rng.normal(0, 20, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


def timm_transform(image: Image.Image, spec: InputSpec) -> np.ndarray:
    from timm.data import create_transform

    transform = create_transform(
        input_size=(3, *spec.size),
        is_training=False,
        use_prefetcher=True,  # ends with uint8 pixels, before normalisation
        interpolation=spec.interpolation,
        crop_pct=spec.crop,
        crop_mode=spec.crop_mode,
        mean=spec.mean,
    )
    return transform(image).numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop", [0.875, 0.9, 0.95, 1.0, 0.224])
@pytest.mark.parametrize("size", [(32, 32), (31, 31), (32, 48), (47, 31)])
def test_equals_timm(size: tuple[int, int], crop: float, interpolation: str, crop_mode: str) -> None:
    spec = InputSpec(size, interpolation=interpolation, crop=crop, crop_mode=crop_mode, enlarge=True)
    for height, width in SIZES:
        image = picture(height, width)
        np.testing.assert_array_equal(
            preprocess(image, spec)[0], timm_transform(image, spec), err_msg=f"{width}×{height}"
        )


@pytest.mark.parametrize("crop", [0.875, 1.0, 0.7])
def test_equals_torchvision(crop: float) -> None:
    from torchvision import transforms

    spec = InputSpec((32, 32), interpolation="bilinear", crop=crop, enlarge=True)
    theirs = transforms.Compose([transforms.Resize(int(32 / crop)), transforms.CenterCrop(32)])
    for height, width in SIZES:
        image = picture(height, width)
        np.testing.assert_array_equal(preprocess(image, spec)[0], np.asarray(theirs(image)))


def test_grey_equals_torchvision() -> None:
    from torchvision import transforms

    spec = InputSpec((28, 28), 1, (0.5,), (0.5,), "bilinear", 0.875)
    theirs = transforms.Compose([transforms.Grayscale(), transforms.Resize(32), transforms.CenterCrop(28)])
    image = picture(61, 45)
    np.testing.assert_array_equal(preprocess(image, spec)[0, :, :, 0], np.asarray(theirs(image)))


def test_an_image_of_the_models_size_is_unchanged() -> None:
    pixels = np.asarray(picture(32, 40))
    np.testing.assert_array_equal(preprocess(pixels, InputSpec((32, 40)))[0], pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_shape_and_dtype(channels: int) -> None:
    spec = InputSpec((20, 24), channels, (0.5,) * channels, (0.5,) * channels)
    batch = preprocess([picture(30, 50), picture(24, 24)], spec)
    assert (batch.shape, batch.dtype) == ((2, 20, 24, channels), np.uint8)
    assert preprocess([], spec).shape == (0, 20, 24, channels)


def test_one_source_or_many(tmp_path: Path) -> None:
    spec = InputSpec((16, 16))
    image = picture(20, 30)
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    array = np.asarray(image)
    expected = preprocess([image], spec)
    for source in (image, array, content, tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(preprocess(source, spec), expected)
        np.testing.assert_array_equal(preprocess([source], spec), expected)
    np.testing.assert_array_equal(preprocess(np.stack([array, array]), spec)[1], expected[0])


@pytest.mark.parametrize("size", [(31, 32), (32, 31), (4, 17)])
def test_smaller_images_are_refused_unless_allowed(size: tuple[int, int]) -> None:
    spec = InputSpec((32, 32))
    with pytest.raises(InputSizeError, match=f"{size[1]}×{size[0]} is smaller than the model's 32×32"):
        preprocess(picture(*size), spec)
    enlarged = preprocess(picture(*size), spec, resize=True)
    np.testing.assert_array_equal(
        enlarged, preprocess(picture(*size), dataclasses.replace(spec, enlarge=True))
    )


def test_the_error_names_the_file(tmp_path: Path) -> None:
    picture(4, 17).save(tmp_path / "tiny.png")
    with pytest.raises(InputSizeError, match=r"tiny\.png 17×4"):
        preprocess([tmp_path / "tiny.png"], InputSpec((32, 32)))


def test_the_error_says_which_of_several_arrays() -> None:
    with pytest.raises(InputSizeError, match="image at index 1"):
        preprocess([picture(40, 40), picture(4, 17)], InputSpec((32, 32)))


def test_a_thread_of_an_image_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(ImageError, match="too long and thin"):
        fit(Image.new("RGB", (1, 60_000)), InputSpec((224, 224), enlarge=True))
