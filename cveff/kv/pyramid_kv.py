"""`PyramidKV`: SnapKV with more tokens in lower layers and fewer in upper ones (arXiv:2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cveff.kv.checks import check_count
from cveff.kv.prompt import Prompt
from cveff.kv.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Budgets fall linearly from the first layer to the last; their mean is `budget` (Cai et al., section 4.2).

    The last layer keeps `base // beta` tokens beyond the window, the first 2 · base less that, where base is the
    budget beyond the window; so no layer is given more than the prompt has.

    Attributes:
        beta: how steep the pyramid is.

    Raises:
        CacheError: at construction, for a value out of range.
    """

    beta: int = 20

    kind: ClassVar[str] = "pyramidkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("pyramidkv.beta", self.beta, least=1)

    def tokens(self, prompt: Prompt) -> int:
        """Tokens a head of this layer may keep."""
        mean = super().tokens(prompt)
        window = min(self.window, mean)
        base, room = mean - window, prompt.num_tokens - window
        least = base // self.beta
        most = 2 * base - least
        if most > room:
            most, least = room, 2 * base - room
        if prompt.num_layers == 1:
            return mean
        fall = (most - least) / (prompt.num_layers - 1)
        return window + round(most - fall * prompt.layer)

    def window_of(self, prompt: Prompt) -> int:
        """Queries that are asked: the same in every layer."""
        return min(self.window, super().tokens(prompt))
