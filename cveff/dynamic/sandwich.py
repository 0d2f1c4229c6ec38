"""Training all sub-nets at once: the sandwich rule and in-place distillation.

Yu & Huang, "Universally Slimmable Networks and Improved Training Techniques" (ICCV 2019), sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.compress.distill_losses import soft_targets
from cveff.dynamic.elastic_space import SubNet
from cveff.dynamic.supernet import Supernet
from cveff.train.objective import CrossEntropy

_TRIES = 20


class Sandwich(CrossEntropy):
    """Cross-entropy of the largest network, plus `KL(largest ‖ sub-net)` of the smallest and of random ones.

    The largest network's answers, through which no gradient flows there, are what the others imitate. The gradient of
    the shared weights is the sum over all of them.

    Args:
        supernet: the sub-nets.
        num_random: sub-nets a step besides the largest and the smallest.
        label_smoothing: of the largest network's cross-entropy.
    """

    def __init__(self, supernet: Supernet, num_random: int, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        self._supernet, self._num_random = supernet, num_random

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of this step's networks, summed over the images."""
        logits = module(images)
        total = self.of_logits(logits, targets)
        answers = logits.detach().float()
        for subnet in self.draw():
            student = self._supernet.run(module, subnet, resized(images, subnet.size))
            total = total + soft_targets(student.float(), answers, temperature=1.0)
        return total

    def draw(self) -> list[SubNet]:
        """The smallest sub-net and random others, all different: a function of torch's seed alone."""
        space = self._supernet.space
        largest, chosen = space.largest, [space.smallest]
        for _ in range(_TRIES * self._num_random):
            if len(chosen) > self._num_random:
                break
            drawn = space.subnet([int(torch.randint(count, ())) for count in space.alternatives])
            if drawn != largest and drawn not in chosen:
                chosen.append(drawn)
        return chosen

    def identity(self) -> Mapping[str, Any]:
        """How many random sub-nets; the space is part of the model."""
        return {"sandwich": self._num_random}


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W) at another size, bilinear with antialiasing."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
