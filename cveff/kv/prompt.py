"""What a policy sees of one sequence at the end of its prefill; attention in chunks, never n × n."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from cveff.kv.rule import PINNED, Rule

CHUNK = 128
"""Query rows whose attention is held at a time."""


@dataclass(frozen=True)
class Prompt:
    """One sequence in one attention layer, without padding. H key-value heads of g query heads each, n tokens.

    Attributes:
        queries: (H, g, n, D) as attention multiplies them.
        keys: (H, n, D), rotated.
        values: (H, n, E).
        scale: factor of the products.
        mask: (n, n) bool, True where a query (row) sees a key, or None for a causal one. It is the model's own and
            read a chunk of rows at a time.
        tags: (n,) uint8, `Marks` bits of the tokens.
        layer: index among the `num_layers` layers that are compressed.
        row: index of the sequence in the batch.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    mask: Tensor | None
    tags: Tensor
    layer: int
    num_layers: int
    row: int

    @property
    def num_heads(self) -> int:
        """Key-value heads."""
        return self.keys.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence."""
        return self.keys.shape[1]

    def attention(self, begin: int = 0) -> Iterator[tuple[int, int, Tensor]]:
        """Attention of the queries from `begin` on, `CHUNK` rows at a time.

        Yields:
            first and last + 1 row, and their softmax (H, g, rows, m) float32 over the first m tokens, where m is the
            last row + 1 under a causal mask and n otherwise; what lies beyond is 0.
        """
        heads, group, num_tokens, _ = self.queries.shape
        for first in range(begin, num_tokens, CHUNK):
            last = min(first + CHUNK, num_tokens)
            width = last if self.mask is None else num_tokens
            rows = self.queries[:, :, first:last].reshape(heads, group * (last - first), -1)
            logits = torch.matmul(rows, self.keys[:, :width].transpose(1, 2)).float() * self.scale
            logits = logits.view(heads, group, last - first, width)
            if self.mask is None:
                places = torch.arange(width, device=logits.device)
                hidden = places > places[first:last, None]
            else:
                hidden = ~self.mask[first:last]
            yield first, last, logits.masked_fill_(hidden, -torch.inf).softmax(-1)

    def received(self, rows: Tensor | None = None) -> Tensor:
        """Attention each token receives, summed over queries and averaged over the heads of a group.

        Args:
            rows: (n,) bool, queries that count; by default all.

        Returns:
            (H, n) float32.
        """
        total = self.keys.new_zeros(self.num_heads, self.num_tokens, dtype=torch.float32)
        for first, last, probabilities in self.attention():
            if rows is not None:
                probabilities = probabilities * rows[first:last, None]
            total[:, : probabilities.shape[-1]] += probabilities.mean(1).sum(1)
        return total

    def codes(self, pinned: Tensor) -> Tensor:
        """(H, n) int32 positions, with the pinned bit where `pinned` (H, n) or (n,) bool says so."""
        places = torch.arange(self.num_tokens, device=pinned.device, dtype=torch.int32)
        return torch.where(pinned, places | PINNED, places).expand(self.num_heads, -1)


@dataclass(frozen=True)
class Selection:
    """What a policy decided for the heads of one sequence in one layer.

    Attributes:
        keep: (H, n) bool, tokens that stay.
        pinned: (H, n) bool, tokens that no rule evicts later.
        rules: what each head keeps from now on.
        labels: a word for each head, for reports.
        scores: (H, n) float32 sums of attention received; needed where a rule asks for them.
    """

    keep: Tensor
    pinned: Tensor
    rules: tuple[Rule, ...]
    labels: tuple[str, ...]
    scores: Tensor | None = None


class Policy(Protocol):
    """What to keep of a cache. A frozen dataclass whose fields are the settings.

    Attributes:
        kind: its name on the command line and in reports.
        needs_tokens: whether it looks at `Prompt.tags`.
    """

    kind: ClassVar[str]
    needs_tokens: ClassVar[bool]

    def select(self, prompt: Prompt) -> Selection:
        """Decide at the end of the prefill what every head keeps, and by which rule it goes on."""
        ...


def keep_once(keep: Tensor, label: str) -> Selection:
    """A selection that is made once: tokens that come later all stay.

    Args:
        keep: (H, n) bool.
        label: the word for every head.
    """
    heads = keep.shape[0]
    return Selection(keep, torch.zeros_like(keep), (Rule(),) * heads, (label,) * heads)
