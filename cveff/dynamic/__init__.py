"""Networks that spend less: exits for easy images, cascades of networks, fewer tokens."""

from __future__ import annotations

from cveff.dynamic.cond_conv import CondConv, ConditionalConvolutions
from cveff.dynamic.early_exit import EarlyExit
from cveff.dynamic.exits import Exits
from cveff.dynamic.reduce_tokens import ReduceTokens
from cveff.dynamic.thresholds import Goal, solve
from cveff.dynamic.token_edit import TokenReduction

__all__ = [
    "CondConv",
    "ConditionalConvolutions",
    "EarlyExit",
    "Exits",
    "Goal",
    "ReduceTokens",
    "TokenReduction",
    "solve",
]
