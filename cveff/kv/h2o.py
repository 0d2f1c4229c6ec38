"""`H2O`: the most recent tokens and the heavy hitters among the others (arXiv:2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cveff.kv.checks import check_amount
from cveff.kv.prompt import Prompt, Selection
from cveff.kv.rule import Amount, Rule, amount, keep_mask


@dataclass(frozen=True)
class H2O:
    """A fixed number of tokens a head: recent ones, and those with the greatest sum of attention received.

    Zhang et al., NeurIPS 2023, Algorithm 1. Sums are averaged over the query heads of a group and kept up to date;
    at every step the least of them goes.

    Attributes:
        heavy: heavy hitters kept, in tokens or as a share of the prompt.
        recent: recent tokens kept, likewise.

    Raises:
        CacheError: at construction, for a value out of range.
    """

    heavy: Amount = 0.1
    recent: Amount = 0.1

    kind: ClassVar[str] = "h2o"
    needs_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_amount("h2o.heavy", self.heavy)
        check_amount("h2o.recent", self.recent, least=1)

    def select(self, prompt: Prompt) -> Selection:
        """Keep the recent tokens and the heavy hitters of the prompt; shares become numbers of tokens here."""
        received = prompt.received()
        rule = Rule(
            local=max(1, amount(self.recent, prompt.num_tokens)),
            frequent=amount(self.heavy, prompt.num_tokens),
            apart=True,
        )
        rules = (rule,) * prompt.num_heads
        pinned = torch.zeros_like(received, dtype=torch.bool)
        keep = keep_mask(prompt.codes(pinned), received, rules, [prompt.num_tokens] * prompt.num_heads)
        return Selection(keep, pinned, rules, (self.kind,) * prompt.num_heads, received)
