"""What a forward pass adds to a layer of a ragged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Tokens that a forward pass adds to a layer: B sequences, N = B · H heads, T tokens.

    Attributes:
        keys: (N, T, D). values: (N, T, E).
        places: (B, T) int32, positions.
        tags: (B, T) uint8.
        valid: (B, T) bool, False for padding; None where nothing is.
        sees: (B, T, T) bool, which of the new tokens a query (row) sees; None for causal.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    tags: Tensor
    valid: Tensor | None = None
    sees: Tensor | None = None

    @property
    def length(self) -> int:
        """T."""
        return self.keys.shape[1]

    def visible(self) -> Tensor:
        """(B, T, T) bool: which of the new tokens a query (row) sees."""
        if self.sees is not None:
            return self.sees
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=self.keys.device).tril()
        return causal.expand(self.places.shape[0], -1, -1)
