"""Training: one readable loop, its optimizers and schedules, and the state that lets it resume."""

from __future__ import annotations

from cveff.train.adapters import Adapters, MergeAdapters
from cveff.train.galore import GaLoreAdamW, GaLoreSGD
from cveff.train.galore_groups import galore_groups
from cveff.train.galore_settings import GaLore
from cveff.train.train import Train
from cveff.train.tune import Tune

__all__ = [
    "Adapters",
    "GaLore",
    "GaLoreAdamW",
    "GaLoreSGD",
    "MergeAdapters",
    "Train",
    "Tune",
    "galore_groups",
]
