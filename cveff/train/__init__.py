"""Training: one readable loop, its optimizers and schedules, and the state that lets it resume."""

from __future__ import annotations

from cveff.train.adapters import Adapters, MergeAdapters
from cveff.train.curriculum import Curriculum
from cveff.train.difficulty_pass import load_difficulty, measure_difficulty
from cveff.train.distributed import Distributed, joined
from cveff.train.feed import Difficulty
from cveff.train.galore import GaLoreAdamW, GaLoreSGD
from cveff.train.galore_groups import galore_groups
from cveff.train.galore_settings import GaLore
from cveff.train.growth import Growth
from cveff.train.importance import Importance
from cveff.train.resolution import Resolution
from cveff.train.selection import Selection
from cveff.train.token_drop import TokenDrop
from cveff.train.train import Train
from cveff.train.tune import Tune

__all__ = [
    "Adapters",
    "Curriculum",
    "Difficulty",
    "Distributed",
    "GaLore",
    "GaLoreAdamW",
    "GaLoreSGD",
    "Growth",
    "Importance",
    "MergeAdapters",
    "Resolution",
    "Selection",
    "TokenDrop",
    "Train",
    "Tune",
    "galore_groups",
    "joined",
    "load_difficulty",
    "measure_difficulty",
]
