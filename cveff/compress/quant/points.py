"""Points of top-1 accuracy that a network loses against another, on a few hundred images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cveff.compress.samples import evaluation, samples
from cveff.data.dataset import Split
from cveff.runtime.input_spec import InputSpec

IMAGES = 500


@dataclass(frozen=True)
class Points:
    """What a network answers, to compare others with.

    Attributes:
        batches: images (B, C, H, W) float, normalised.
        expected: its answers, (N,) int64.
        targets: the right ones, (N,) int64; None without labels.
    """

    batches: tuple[Tensor, ...]
    expected: Tensor
    targets: Tensor | None

    @classmethod
    def of(
        cls, network: nn.Module, split: Split, spec: InputSpec, *, count: int = IMAGES, seed: int = 0
    ) -> Points:
        """Ask `network`.

        Args:
            split: at most `count` of its images are drawn, evenly over the classes.

        Raises:
            StepError: the split has no images.
        """
        found = samples(split, spec, count, seed=seed)
        batches = tuple(images for images, _ in found)
        labels = [targets for _, targets in found if targets is not None]
        targets = torch.cat(labels) if len(labels) == len(found) else None
        if targets is not None and bool((targets < 0).any()):
            targets = None
        return cls(batches, _answers(network, batches), targets)

    @property
    def resolution(self) -> float:
        """Points that one image is worth."""
        return 100 / len(self.expected)

    def lost(self, network: nn.Module) -> float:
        """Points of accuracy that `network` has less than the first; without labels, of answers that differ."""
        answers = _answers(network, self.batches)
        if self.targets is None:
            wrong = (answers != self.expected).sum()
        else:
            wrong = (self.expected == self.targets).sum() - (answers == self.targets).sum()
        return 100 * float(wrong) / len(self.expected)


@torch.no_grad()
def _answers(network: nn.Module, batches: tuple[Tensor, ...]) -> Tensor:
    with evaluation(network):
        return torch.cat([network(images).argmax(1) for images in batches])
