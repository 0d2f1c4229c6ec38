"""Training: one readable loop, its optimizers and schedules, and the state that lets it resume."""

from __future__ import annotations

from cveff.train.galore import GaLoreAdamW, GaLoreSGD
from cveff.train.galore_groups import galore_groups
from cveff.train.galore_settings import GaLore
from cveff.train.train import Train

__all__ = ["GaLore", "GaLoreAdamW", "GaLoreSGD", "Train", "galore_groups"]
