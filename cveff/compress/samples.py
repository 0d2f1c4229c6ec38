"""The few images that criteria and repairs look at: drawn from a split, checked, walked in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cveff.data.augment import normalize
from cveff.data.dataset import Split
from cveff.data.sampling import calibration_images, calibration_indices
from cveff.errors import StepError
from cveff.runtime.input_spec import InputSpec

Batches = Sequence[tuple[Tensor, Tensor | None]]
"""Images (B, C, H, W) float, normalised, and their classes (B,) int64; None, or -1 within, where there are none."""


def samples(
    split: Split, spec: InputSpec, count: int, *, batch_size: int = 32, seed: int = 0, device: str = "cpu"
) -> list[tuple[Tensor, Tensor | None]]:
    """A class-balanced sample of `split`, without augmentation, as the network takes it.

    Args:
        count: how many images; a smaller split gives all it has.

    Raises:
        StepError: `count` or `batch_size` is not positive, or the split is empty.
    """
    if count < 1 or batch_size < 1:
        raise StepError(f"{count} calibration images in batches of {batch_size}: give positive numbers")
    if len(split) == 0:
        raise StepError(f"split {split.name!r} has no images to calibrate on; give at least one")
    images = normalize(calibration_images(split, spec, count, seed), spec).to(device)
    if split.targets is None:
        return [(part, None) for part in images.split(batch_size)]
    targets = torch.from_numpy(split.targets[calibration_indices(split, count, seed)]).to(device)
    return list(zip(images.split(batch_size), targets.split(batch_size), strict=True))


def calibration_batches(
    split: Split, spec: InputSpec, count: int, *, batch_size: int = 32, seed: int = 0
) -> list[Tensor]:
    """The images of `samples` in mixed order, so that any stretch of them is a fair sample of all classes.

    Raises:
        StepError: as `samples`.
        InputSizeError, ImageError: an image that the network cannot take.
    """
    found = [images for images, _ in samples(split, spec, count, batch_size=count, seed=seed)]
    return mixed(found[0], batch_size, seed)


def mixed(images: Tensor, batch_size: int, seed: int) -> list[Tensor]:
    """Batches of images (N, C, H, W) in a random order: those of a folder stand class by class."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return [images[part] for part in order.split(batch_size)]


def require_batches(batches: Batches | None, purpose: str) -> Batches:
    """`batches`, if there is at least one image in them.

    Raises:
        StepError: None, no batch or an empty one, targets of another length, or values that are not finite.
    """
    if batches is None:
        raise StepError(f"{purpose} looks at images; pass data=…, or choose importance='magnitude'")
    if len(batches) == 0:
        raise StepError(f"{purpose} got no images; give at least one batch")
    for index, (images, targets) in enumerate(batches):
        if images.ndim != 4 or len(images) == 0:
            raise StepError(
                f"{purpose}: batch {index} has shape {tuple(images.shape)}; give (B, C, H, W) with B ≥ 1"
            )
        if targets is not None and targets.shape != images.shape[:1]:
            raise StepError(
                f"{purpose}: batch {index} has {len(images)} images and targets {tuple(targets.shape)}; "
                "give one class an image"
            )
        if not bool(torch.isfinite(images).all()):
            raise StepError(
                f"{purpose}: batch {index} holds NaN or infinity; check the images' normalisation"
            )
    return batches


def labels_of(targets: Tensor | None) -> Tensor | None:
    """`targets` if every image has a class, else None."""
    return None if targets is None or bool((targets < 0).any()) else targets


@contextmanager
def evaluation(module: nn.Module) -> Iterator[nn.Module]:
    """`module` in evaluation mode; each part's own mode is put back."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield forget(module)
    finally:
        forget(module)
        for part, training in modes:
            part.training = training


def forget(module: nn.Module) -> nn.Module:
    """Empty what attention layers (LeViT's, EfficientFormer's, TinyViT's) cache in evaluation mode; then that mode.

    Their cached biases hold the graph of the pass that made them, and outlive the weights they came from.
    Entering training mode is how these layers are told.
    """
    return module.train().eval()
