"""`AdaKV`: the heads of a layer share their budget by what they look at (arXiv:2407.11550)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from cveff.kv.checks import check_share
from cveff.kv.prompt import Prompt, Selection, keep_once
from cveff.kv.rule import largest
from cveff.kv.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV:
    """Keep the best tokens of a layer whichever head they belong to (Feng et al., Algorithm 1).

    Attributes:
        base: gives the scores and the mean budget: `SnapKV` or `PyramidKV`.
        floor: share of the budget that every head keeps at least; its observation window stays anyway.

    Raises:
        CacheError: at construction, for a value out of range.
    """

    base: SnapKV = field(default_factory=SnapKV)
    floor: float = 0.2

    kind: ClassVar[str] = "adakv"
    needs_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_share("adakv.floor", self.floor, allow_zero=True)

    def select(self, prompt: Prompt) -> Selection:
        """Give every head its floor, and what is left of the layer's budget to the best scores of all heads."""
        scores = self.base.scores(prompt)
        heads, budget = prompt.num_heads, self.base.tokens(prompt)
        floor = max(int(self.floor * budget), self.base.window_of(prompt))
        keep = largest(scores, [floor] * heads)
        rest = scores.masked_fill(keep, -torch.inf).reshape(1, -1)
        keep = keep | largest(rest, [heads * (budget - floor)]).view_as(keep)
        return keep_once(keep, self.kind)
