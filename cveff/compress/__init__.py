"""Compression: methods that make a trained network smaller, and the fine-tuning that recovers its accuracy."""

from __future__ import annotations

from cveff.compress.distill import Distill
from cveff.compress.low_rank import LowRank
from cveff.compress.prune import Prune
from cveff.compress.quantize import Quantize
from cveff.compress.sparsify import Sparsify

__all__ = ["Distill", "LowRank", "Prune", "Quantize", "Sparsify"]
