"""Random changes to training images, on whole batches: crop, flip, random erasing, mixup, cutmix.

Crop with padding and alternating flip follow Keller Jordan's airbench (arXiv:2404.00498), erasing
arXiv:1708.04896, mixup arXiv:1710.09412, cutmix arXiv:1905.04899, random resized crop arXiv:1409.4842.
Geometry works on uint8, where a batch is four times smaller; erasing and mixing on normalised values.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cveff.data.augmentation import Augmentation
from cveff.errors import DataError
from cveff.runtime.input_spec import InputSpec

__all__ = ["Augmentation", "erase", "mirror", "mix", "normalize", "random_resized_crop", "shift"]

ERASING_AREA = (0.02, 0.3)
ERASING_ASPECT = (0.3, 3.3)


def shift(
    images: np.ndarray,
    padding: int,
    random: np.random.Generator,
    drawn: int | None = None,
    places: np.ndarray | None = None,
) -> np.ndarray:
    """Cut a window at a random place of each image padded by reflection.

    Args:
        images: (B, H, W, C) uint8.
        padding: pixels on every side, less than H and W.
        drawn, places: `images` are those at `places` (B,) of a batch of `drawn`; by default the batch.

    Returns:
        (B, H, W, C) uint8.
    """
    count, height, width, _ = images.shape
    if padding >= min(height, width):
        raise DataError(
            f"augmentation.crop_padding is {padding}; it must be less than the image's {height}×{width}"
        )
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (height, width), axis=(1, 2)
    )  # (B, P, P, C, H, W)
    top, left = random.integers(0, 2 * padding + 1, (2, count if drawn is None else drawn))
    if places is not None:
        top, left = top[places], left[places]
    return windows.transpose(0, 1, 2, 4, 5, 3)[np.arange(count), top, left]


def mirror(images: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Mirror left and right the images where `chosen` (B,) is true; `images` (B, H, W, C) is kept."""
    if not chosen.any():
        return images
    images = images.copy()
    images[chosen] = images[chosen][:, :, ::-1]
    return images


def normalize(images: np.ndarray, spec: InputSpec) -> Tensor:
    """uint8 (B, H, W, C) to float32 (B, C, H, W), channels last in memory: `(x / 255 - mean) / std`."""
    count, height, width, channels = images.shape
    rows = torch.from_numpy(np.ascontiguousarray(images)).view(count, height, width * channels).float()
    # One value per position in a row: broadcasting over a last axis of 3 would leave vector units idle.
    mean, std = (torch.tensor(values, dtype=torch.float32).repeat(width) for values in (spec.mean, spec.std))
    rows.div_(255).sub_(mean).div_(std)
    return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


def erase(
    images: Tensor,
    probability: float,
    random: np.random.Generator,
    drawn: int | None = None,
    places: np.ndarray | None = None,
) -> None:
    """Fill a random rectangle of some images with standard normal noise, in place.

    Args:
        images: (B, C, H, W) float32, normalised, channels last in memory.
        drawn, places: as for `shift`.
    """
    _, channels, height, width = images.shape
    count = len(images) if drawn is None else drawn
    chosen = random.random(count) < probability
    area = random.uniform(*ERASING_AREA, size=count) * (height * width)
    aspect = np.exp(random.uniform(math.log(ERASING_ASPECT[0]), math.log(ERASING_ASPECT[1]), size=count))
    tall = np.clip(np.rint(np.sqrt(area * aspect)), 1, height).astype(np.int64)
    wide = np.clip(np.rint(np.sqrt(area / aspect)), 1, width).astype(np.int64)
    top = (random.random(count) * (height - tall + 1)).astype(np.int64)
    left = (random.random(count) * (width - wide + 1)).astype(np.int64)
    pixels = images.permute(0, 2, 3, 1).numpy()
    row = {int(place): row for row, place in enumerate(np.arange(count) if places is None else places)}
    for place in np.flatnonzero(chosen):
        # Drawn for images of other ranks too, as what comes next in the stream depends on it.
        noise = random.standard_normal((tall[place], wide[place], channels), dtype=np.float32)
        if int(place) in row:
            rows, columns = (
                slice(begin[place], begin[place] + size[place]) for begin, size in ((top, tall), (left, wide))
            )
            pixels[row[int(place)], rows, columns] = noise


def mix(
    images: Tensor, targets: Tensor, augmentation: Augmentation, num_classes: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix with the batch in reverse order.

    Args:
        images: (B, C, H, W) float32.
        targets: (B,) int64.

    Returns:
        images as given in shape, and soft targets (B, num_classes) float32 whose rows sum to 1.
    """
    use_cutmix = augmentation.cutmix > 0 and (augmentation.mixup == 0 or random.random() < 0.5)
    alpha = augmentation.cutmix if use_cutmix else augmentation.mixup
    share = float(random.beta(alpha, alpha))
    if use_cutmix:
        height, width = images.shape[2:]
        side = math.sqrt(1 - share)
        centre_y, centre_x = int(random.integers(0, height)), int(random.integers(0, width))
        half_y, half_x = round(height * side) // 2, round(width * side) // 2
        top, bottom = max(centre_y - half_y, 0), min(centre_y + half_y, height)
        left, right = max(centre_x - half_x, 0), min(centre_x + half_x, width)
        patch = images[:, :, top:bottom, left:right].flip(0)
        images[:, :, top:bottom, left:right] = patch
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = torch.lerp(images.flip(0), images, share)
    soft = torch.zeros(len(targets), num_classes)
    soft.scatter_add_(1, targets[:, None], torch.full((len(targets), 1), share))
    soft.scatter_add_(1, targets.flip(0)[:, None], torch.full((len(targets), 1), 1 - share))
    return images.contiguous(memory_format=torch.channels_last), soft


def random_resized_crop(
    image: Image.Image, spec: InputSpec, min_scale: float, random: np.random.Generator
) -> np.ndarray:
    """Cut a random part of an image and resize it to the model's input; torchvision's choice of the part.

    Args:
        image: as `runtime.preprocess.decode` returns it.
        min_scale: smallest share of the area; aspect ratios lie in [3/4, 4/3].

    Returns:
        (H, W, C) uint8 of `spec.size`.
    """
    left, top, wide, tall = _random_box(image.width, image.height, min_scale, random)
    height, width = spec.size
    part = image.crop((left, top, left + wide, top + tall))
    resized = part.resize((width, height), Image.Resampling[spec.interpolation.upper()])
    return np.asarray(resized, dtype=np.uint8).reshape(height, width, spec.channels)


def _random_box(
    width: int, height: int, min_scale: float, random: np.random.Generator
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * random.uniform(min_scale, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return (
                int(random.integers(0, width - wide + 1)),
                int(random.integers(0, height - tall + 1)),
                wide,
                tall,
            )
    # No box of these proportions fits a very long image: take the largest central one.
    wide = min(width, round(height * 4 / 3))
    tall = min(height, round(width * 4 / 3))
    return (width - wide) // 2, (height - tall) // 2, wide, tall
