"""Compression: methods that make a trained network smaller, and the fine-tuning that recovers its accuracy."""

from __future__ import annotations

from cveff.compress.distill import Distill

__all__ = ["Distill"]
