"""Networks that spend less on easy images: exits inside a network, and cascades of networks."""

from __future__ import annotations

from cveff.dynamic.early_exit import EarlyExit
from cveff.dynamic.exits import Exits
from cveff.dynamic.thresholds import Goal, solve

__all__ = ["EarlyExit", "Exits", "Goal", "solve"]
