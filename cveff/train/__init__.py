"""Training: one readable loop, its optimizers and schedules, and the state that lets it resume."""

from __future__ import annotations

from cveff.train.curriculum import Curriculum
from cveff.train.difficulty_pass import load_difficulty, measure_difficulty
from cveff.train.feed import Difficulty
from cveff.train.importance import Importance
from cveff.train.resolution import Resolution
from cveff.train.selection import Selection
from cveff.train.token_drop import TokenDrop
from cveff.train.train import Train

__all__ = [
    "Curriculum",
    "Difficulty",
    "Importance",
    "Resolution",
    "Selection",
    "TokenDrop",
    "Train",
    "load_difficulty",
    "measure_difficulty",
]
