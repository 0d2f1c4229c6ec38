"""`Full`: everything stays. What other policies are compared with, and what packed storage alone needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cveff.kv.prompt import Prompt, Selection, keep_once


@dataclass(frozen=True)
class Full:
    """Evict nothing."""

    kind: ClassVar[str] = "full"
    needs_tokens: ClassVar[bool] = False

    def select(self, prompt: Prompt) -> Selection:
        """Keep all tokens."""
        shape = (prompt.num_heads, prompt.num_tokens)
        return keep_once(torch.ones(shape, dtype=torch.bool, device=prompt.keys.device), self.kind)
