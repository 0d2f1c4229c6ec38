"""An exponential moving average of a network's parameters and statistics (Polyak & Juditsky 1992)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cveff.train.sharded import local


class MovingAverage:
    """Keeps `average ← d · average + (1 - d) · module`, with `d = min(decay, (1 + step) / (10 + step))`.

    Attributes:
        module: the averaged network, in evaluation mode.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in `module` after optimizer step `step` (from 1)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, values = (
            {name: local(value) for name, value in item.state_dict().items()}
            for item in (self.module, module)
        )
        floating = [name for name, value in averages.items() if value.dtype.is_floating_point]
        torch._foreach_lerp_(
            [averages[name] for name in floating], [values[name] for name in floating], weight
        )
        for name, average in averages.items():
            if not average.dtype.is_floating_point:
                average.copy_(values[name])
