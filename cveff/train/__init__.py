"""Training: one readable loop, its optimizers and schedules, and the state that lets it resume."""

from __future__ import annotations

from cveff.train.growth import Growth
from cveff.train.train import Train

__all__ = ["Growth", "Train"]
