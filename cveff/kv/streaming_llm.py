"""`StreamingLLM`: the first tokens and a recent window, at positions within the cache (arXiv:2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cveff.kv.checks import check_amount, check_count
from cveff.kv.prompt import Prompt, Selection
from cveff.kv.rule import Amount, Rule, amount, keep_mask


@dataclass(frozen=True)
class StreamingLLM:
    """Attention sinks and a sliding window (Xiao et al., ICLR 2024, section 3.2).

    The paper counts positions within the cache. Rotary embeddings only see differences of positions, and within the
    window those are what they were; so the queries keep their positions, and the sinks' keys are rotated on by the
    number of tokens evicted, from the keys they had in the prompt, which costs `sinks` rotations a step and no drift.

    Attributes:
        sinks: first tokens, kept for good.
        window: recent tokens kept, in tokens or as a share of the prompt.

    Raises:
        CacheError: at construction, for a value out of range. `compress` refuses models without rotary embeddings.
    """

    sinks: int = 4
    window: Amount = 0.2

    kind: ClassVar[str] = "streaming-llm"
    needs_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("streaming_llm.sinks", self.sinks)
        check_amount("streaming_llm.window", self.window, least=1)

    def select(self, prompt: Prompt) -> Selection:
        """Keep the sinks and the window of the prompt; a share becomes a number of tokens here."""
        rule = Rule(local=max(1, amount(self.window, prompt.num_tokens)), rerotate=True)
        rules = (rule,) * prompt.num_heads
        first = torch.arange(prompt.num_tokens, device=prompt.keys.device) < self.sinks
        pinned = first.expand(prompt.num_heads, -1)
        keep = keep_mask(prompt.codes(pinned), None, rules, [prompt.num_tokens] * prompt.num_heads)
        return Selection(keep, pinned, rules, (self.kind,) * prompt.num_heads)
