"""What token merging must beat at equal tokens: merging at random, and pooling neighbours whatever they show."""

from __future__ import annotations

import torch
from torch import Tensor

from cveff.dynamic import ReduceTokens
from cveff.dynamic.token_edit import reduced_blocks
from cveff.dynamic.tome import MergeTokens
from cveff.model import Model, with_module


class RandomMerging(MergeTokens):
    """Pairs drawn by chance, the same for each image."""

    def match(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Random ranks and partners."""
        random = torch.Generator().manual_seed(a.shape[1])
        similarity = torch.rand(a.shape[1], generator=random).to(a)
        best = torch.randint(b.shape[1], (a.shape[1],), generator=random).to(a.device)
        return similarity.expand(a.shape[0], -1), best.expand(a.shape[0], -1)


class AveragePooling(MergeTokens):
    """Every token of A into its neighbour on the right, those that are merged spread evenly over the image."""

    def match(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Ranks by bit reversal in base 2 (van der Corput), which spreads any number of first ones; the neighbour."""
        number = torch.arange(a.shape[1], device=a.device)
        similarity = torch.zeros(a.shape[1], device=a.device)
        for bit in range(16):
            similarity -= (number // 2**bit % 2) * 0.5 ** (bit + 1)
        best = number.clamp(max=b.shape[1] - 1)
        return similarity.to(a.dtype).expand(a.shape[0], -1), best.expand(a.shape[0], -1)


def merged_by(rule: type[MergeTokens], model: Model, step: ReduceTokens) -> Model:
    """`model` with tokens merged as ToMe would by `step`, but in pairs that `rule` chooses."""
    edit = step.plan(model.module)
    module = step.attach(model.module)
    blocks = reduced_blocks(module)
    assert blocks is not None
    for name, reducer in blocks.reducers.items():
        assert isinstance(reducer, MergeTokens)
        blocks.reducers[name] = rule(reducer.r, reducer.proportional)
    return with_module(model, module.eval(), edit)
