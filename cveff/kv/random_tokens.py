"""`Random`: tokens drawn at random, the baseline that every policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cveff.kv.checks import check_amount, check_count
from cveff.kv.prompt import Prompt, Selection, keep_once
from cveff.kv.rule import Amount, amount, largest


@dataclass(frozen=True)
class Random:
    """Keep random tokens of the prompt, other ones in each head, and all that are generated.

    Attributes:
        budget: tokens kept a head, in tokens or as a share of the prompt.
        recent: of these, the most recent ones, which are not drawn.
        seed: of the draw; layers and sequences differ.

    Raises:
        CacheError: at construction, for a value out of range.
    """

    budget: Amount = 0.5
    recent: int = 1
    seed: int = 0

    kind: ClassVar[str] = "random"
    needs_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_amount("random.budget", self.budget, least=1)
        check_count("random.recent", self.recent)
        check_count("random.seed", self.seed)

    def select(self, prompt: Prompt) -> Selection:
        """Draw on the CPU, so that every device keeps the same tokens."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + prompt.layer * 1_009 + prompt.row)
        drawn = torch.rand(prompt.num_heads, prompt.num_tokens, generator=generator)
        if self.recent:
            drawn[:, -self.recent :] = 2
        count = min(max(1, amount(self.budget, prompt.num_tokens)), prompt.num_tokens)
        return keep_once(largest(drawn.to(prompt.keys.device), [count] * prompt.num_heads), self.kind)
