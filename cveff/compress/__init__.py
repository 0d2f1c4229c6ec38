"""Compression: fewer channels, heads, blocks and ranks, with the dense network as the teacher."""

from __future__ import annotations

from cveff.compress.distill import Distill
from cveff.compress.low_rank import LowRank

__all__ = ["Distill", "LowRank"]
