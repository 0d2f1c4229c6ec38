"""Networks that spend less: exits for easy images, cascades, crops, fewer tokens, many networks from one training."""

from __future__ import annotations

from cveff.dynamic.cond_conv import CondConv, ConditionalConvolutions
from cveff.dynamic.early_exit import EarlyExit
from cveff.dynamic.elastic import Elastic
from cveff.dynamic.elastic_space import ElasticSpace, SubNet
from cveff.dynamic.exits import Exits
from cveff.dynamic.extract import ExtractSubNet
from cveff.dynamic.glance_focus import GlanceFocus
from cveff.dynamic.reduce_tokens import ReduceTokens
from cveff.dynamic.thresholds import Goal, solve
from cveff.dynamic.token_edit import TokenReduction
from cveff.dynamic.views import Views

__all__ = [
    "CondConv",
    "ConditionalConvolutions",
    "EarlyExit",
    "Elastic",
    "ElasticSpace",
    "Exits",
    "ExtractSubNet",
    "GlanceFocus",
    "Goal",
    "ReduceTokens",
    "SubNet",
    "TokenReduction",
    "Views",
    "solve",
]
