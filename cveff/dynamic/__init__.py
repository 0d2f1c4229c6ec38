"""Dynamic networks: methods that spend compute where an image needs it."""

from __future__ import annotations

from cveff.dynamic.reduce_tokens import ReduceTokens
from cveff.dynamic.token_edit import TokenReduction

__all__ = ["ReduceTokens", "TokenReduction"]
