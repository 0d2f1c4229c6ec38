"""`SnapKV`: what the last queries of the prompt look at (arXiv:2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cveff.errors import CacheError
from cveff.kv.checks import check_amount, check_count
from cveff.kv.prompt import Prompt, Selection, keep_once
from cveff.kv.rule import Amount, amount, largest


@dataclass(frozen=True)
class SnapKV:
    """Keep an observation window and what it attends to most, once, at the end of the prompt.

    Li et al., NeurIPS 2024, section 4: mean over the window's queries (and the group's heads), average pooling over
    neighbours, the best of each head. Tokens that are generated later all stay.

    Attributes:
        budget: tokens kept a head, the window included; in tokens or as a share of the prompt. A prompt that is no
            longer is left as it is.
        window: last queries that are asked, and whose tokens stay.
        kernel: width of the pooling, odd.

    Raises:
        CacheError: at construction, for a value out of range.
    """

    budget: Amount = 0.5
    window: int = 64
    kernel: int = 5

    kind: ClassVar[str] = "snapkv"
    needs_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_amount("snapkv.budget", self.budget, least=1)
        check_count("snapkv.window", self.window, least=1)
        check_count("snapkv.kernel", self.kernel, least=1)
        if self.kernel % 2 == 0:
            raise CacheError(f"snapkv.kernel is {self.kernel}; give an odd width, which has a middle")

    def select(self, prompt: Prompt) -> Selection:
        """Keep the window and each head's best tokens before it."""
        counts = [self.tokens(prompt)] * prompt.num_heads
        return keep_once(largest(self.scores(prompt), counts), self.kind)

    def tokens(self, prompt: Prompt) -> int:
        """Tokens a head may keep of this prompt, at least one."""
        return min(max(1, amount(self.budget, prompt.num_tokens)), prompt.num_tokens)

    def window_of(self, prompt: Prompt) -> int:
        """Queries that are asked: no more than the budget allows to keep."""
        return min(self.window, self.tokens(prompt))

    def scores(self, prompt: Prompt) -> Tensor:
        """What each token is worth, (H, n) float32; the window's own are above all others, newest first."""
        begin = prompt.num_tokens - self.window_of(prompt)
        total = prompt.keys.new_zeros(prompt.num_heads, prompt.num_tokens, dtype=torch.float32)
        for _, _, probabilities in prompt.attention(begin):
            total[:, : probabilities.shape[-1]] += probabilities.mean(1).sum(1)
        total = total / (prompt.num_tokens - begin)
        if begin:
            total[:, :begin] = F.avg_pool1d(
                total[:, None, :begin], self.kernel, stride=1, padding=self.kernel // 2
            )[:, 0]
        # Attention is at most 1, so the window is chosen first.
        total[:, begin:] = 2 + torch.arange(prompt.num_tokens - begin, device=total.device)
        return total
