"""Calibration images on which a network computes values many times as large as on others.

A trained network may have directions in which nothing keeps its activations small, and a few images that go far in
them. A range that holds their values leaves all other images a few of its 256 steps; a second moment that holds their
squares says nothing of the others. Such images are found here, so that ranges and moments can be made without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cveff.compress.samples import Batches, evaluation

USUAL = 0.9
"""Share of the images that say what is usual: where more than the rest are odd, none is."""
FAR = 4.0
"""Times the usual that a value has to reach."""
PLACES = 0.05
"""Share of the layers where it has to, and two layers at least."""
FEWEST = 20
"""With fewer images there is no telling what is usual."""


class Reaches:
    """How far each image goes in each layer.

    Args:
        sizes: images in every batch.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._splits, self._count = list(sizes), sum(sizes)
        self._seen: dict[str, Tensor] = {}

    def look(self, name: str, x: Tensor, batch: int) -> None:
        """Layer `name` is handed `x`, whose first dimension is the batch's images, or several windows of each; anything
        else, as a table of positions, tells nothing of an image and is passed over.
        """
        number = self._splits[batch]
        if x.ndim == 0 or x.shape[0] % number or not x.is_floating_point():
            return
        largest = x.detach().reshape(number, -1).abs().amax(1).float().cpu()
        reached = self._seen.setdefault(name, torch.zeros(self._count))
        part = reached.split(self._splits)[batch]
        torch.maximum(part, largest, out=part)

    def odd(self) -> Tensor:
        """(images,) bool: which go far past what others do in many layers."""
        if self._count < FEWEST or not self._seen:
            return torch.zeros(self._count, dtype=torch.bool)
        seen = torch.stack(list(self._seen.values()))  # (layers, images)
        usual = seen.quantile(USUAL, dim=1, keepdim=True)
        return (seen > FAR * usual).sum(0) >= max(2.0, PLACES * len(seen))


def odd_images(module: nn.Module, batches: Batches) -> Tensor:
    """Which images take the inputs of many of a network's layers far past what others do.

    Returns:
        (images,) bool.
    """
    reaches = Reaches([len(images) for images, _ in batches])
    layers = {name: part for name, part in module.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))}
    with torch.no_grad(), evaluation(module):
        for index, (images, _) in enumerate(batches):
            handles = [
                part.register_forward_pre_hook(partial(_look, reaches, name, index))
                for name, part in layers.items()
            ]
            try:
                module(images)
            finally:
                for handle in handles:
                    handle.remove()
    return reaches.odd()


def _look(reaches: Reaches, name: str, batch: int, part: nn.Module, given: tuple[Any, ...]) -> None:
    reaches.look(name, given[0], batch)


def told(odd: Tensor) -> str:
    """How many images `odd`, (images,) bool, marks, in words."""
    return f"{int(odd.sum())} of {len(odd)} images reach far larger values than the others"


def usual(batches: Batches, odd: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """The batches less the images that `odd`, (images,) bool, marks."""
    kept = [
        (images[keep], None if targets is None else targets[keep])
        for (images, targets), keep in zip(
            batches, (~odd).split([len(images) for images, _ in batches]), strict=True
        )
    ]
    return [(images, targets) for images, targets in kept if len(images)]
