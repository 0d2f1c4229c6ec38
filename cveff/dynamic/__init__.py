"""Networks that spend less: exits for easy images, cascades, fewer tokens, and many networks from one training."""

from __future__ import annotations

from cveff.dynamic.cond_conv import CondConv, ConditionalConvolutions
from cveff.dynamic.early_exit import EarlyExit
from cveff.dynamic.elastic import Elastic
from cveff.dynamic.elastic_space import ElasticSpace, SubNet
from cveff.dynamic.exits import Exits
from cveff.dynamic.extract import ExtractSubNet
from cveff.dynamic.reduce_tokens import ReduceTokens
from cveff.dynamic.thresholds import Goal, solve
from cveff.dynamic.token_edit import TokenReduction

__all__ = [
    "CondConv",
    "ConditionalConvolutions",
    "EarlyExit",
    "Elastic",
    "ElasticSpace",
    "Exits",
    "ExtractSubNet",
    "Goal",
    "ReduceTokens",
    "SubNet",
    "TokenReduction",
    "solve",
]
