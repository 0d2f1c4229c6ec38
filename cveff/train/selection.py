"""Training on the informative part of a data set (data pruning: Paul et al., arXiv:2107.07075; low-confidence
selection: Jordan, arXiv:2404.00498)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cveff.errors import TrainingError
from cveff.train.difficulty import require_metric


@dataclass(frozen=True)
class Selection:
    """Which images are trained on; the others are never seen.

    Attributes:
        keep: share of the images.
        metric: what difficulty is (`cveff.train.difficulty`); "random" is what others are compared with.
        prefer: "hard" keeps the most difficult, "easy" the least: better where little is kept (Sorscher et al.,
            arXiv:2206.14486) or labels are wrong.
        balanced: keep the same share of every class.
    """

    keep: float = 0.75
    metric: str = "el2n"
    prefer: Literal["hard", "easy"] = "hard"
    balanced: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise TrainingError(f"selection.keep is {self.keep!r}; give a share in (0, 1]")
        require_metric(self.metric, "selection.metric")
        if self.prefer not in ("hard", "easy"):
            raise TrainingError(f"selection.prefer is {self.prefer!r}; give 'hard' or 'easy'")

    def chosen(self, difficulty: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Indices of the images to keep, ascending, int64; at least one of every class, if balanced.

        Args:
            difficulty: (N,) float, higher is harder.
            targets: (N,) int64.
        """
        groups = targets if self.balanced else np.zeros_like(targets)
        ranking = np.argsort(-difficulty if self.prefer == "hard" else difficulty, kind="stable")
        kept = []
        for group in np.unique(groups):
            members = ranking[groups[ranking] == group]
            kept.append(members[: max(1, round(self.keep * len(members)))])
        return np.sort(np.concatenate(kept)).astype(np.int64)
