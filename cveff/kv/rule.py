"""What a head keeps: a rule of pinned tokens, a recent window and the most attended, used at prefill and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PINNED = 1 << 30
"""Bit of a code that says its token is never evicted; the other bits are the token's position."""
DEAD = -1
"""Code of a slot whose token was evicted and whose bytes are not yet freed."""

Amount = int | float
"""Tokens: an int counts them, a float is a share of a length."""


def amount(value: Amount, length: int) -> int:
    """`value` in tokens, where shares are of `length`, rounded down."""
    return value if isinstance(value, int) else int(value * length)


@dataclass(frozen=True)
class Rule:
    """What a head keeps at every step. Without any of `local` and `frequent` set, and not `only_pinned`: everything.

    Attributes:
        tags: bits of the tags (`Marks`) whose tokens are pinned, those generated later too.
        local: the most recent tokens, in tokens or as a share of the length so far.
        frequent: those with the greatest sum of attention received, likewise.
        apart: the frequent ones are chosen among those outside `local` (H2O), not among all (FastGen).
        normalize: divide a sum by the number of queries that could see the token.
        only_pinned: nothing but pinned tokens is kept.
        rerotate: positions are those within the cache (StreamingLLM).
        length: what shares are of, where that is not the current length.
    """

    tags: int = 0
    local: Amount | None = None
    frequent: Amount | None = None
    apart: bool = False
    normalize: bool = False
    only_pinned: bool = False
    rerotate: bool = False
    length: int | None = None

    @property
    def evicts(self) -> bool:
        """Whether it ever drops a token."""
        return self.only_pinned or self.local is not None or self.frequent is not None

    @property
    def needs_scores(self) -> bool:
        """Whether sums of attention have to be kept up to date."""
        return self.frequent is not None

    def window(self, seen: int) -> int:
        """Number of recent tokens kept when `seen` tokens were seen."""
        return 0 if self.local is None else amount(self.local, self.length or seen)

    def heavy(self, seen: int) -> int:
        """Number of frequent tokens kept when `seen` tokens were seen."""
        return 0 if self.frequent is None else amount(self.frequent, self.length or seen)

    def numbers(self, seen: int) -> tuple[int, int, int, int, int, int]:
        """The rule as `cveff.kernels.evict_tokens` takes it when `seen` tokens were seen."""
        window, heavy = self.window(seen), self.heavy(seen)
        return int(self.evicts), seen, window, heavy, int(self.apart), int(self.normalize)


def positions(codes: Tensor) -> Tensor:
    """Positions that `codes` hold; meaningless for dead slots."""
    return codes & (PINNED - 1)


def keep_mask(
    codes: Tensor,
    scores: Tensor | None,
    rules: Sequence[Rule],
    seen: Sequence[int],
    alive: Tensor | None = None,
) -> Tensor:
    """Which slots are kept.

    Args:
        codes: (S, n) int32, positions with the `PINNED` bit; S is any set of heads.
        scores: (S, n) float32, sums of attention received; needed where a rule has `frequent`.
        rules: S of them.
        seen: S numbers of tokens seen so far, the newest included.
        alive: (S, n) bool, slots that hold a token; by default all.

    Returns:
        (S, n) bool.
    """
    place = positions(codes)
    everything = [not rule.evicts for rule in rules]
    keep = (codes & PINNED) != 0
    starts = [
        0 if all_ else s - rule.window(s) for rule, s, all_ in zip(rules, seen, everything, strict=True)
    ]
    recent = place >= torch.tensor(starts, device=codes.device, dtype=codes.dtype)[:, None]
    heavy = [0 if all_ else rule.heavy(s) for rule, s, all_ in zip(rules, seen, everything, strict=True)]
    if scores is not None and any(heavy):
        candidates = scores
        if any(rule.normalize for rule in rules):
            last = torch.tensor(list(seen), device=codes.device, dtype=torch.float32)[:, None]
            divided = scores / (last - place).clamp(min=1)
            chosen = torch.tensor([rule.normalize for rule in rules], device=codes.device)[:, None]
            candidates = torch.where(chosen, divided, scores)
        out = torch.tensor([rule.apart for rule in rules], device=codes.device)[:, None] & recent
        if alive is not None:
            out = out | ~alive
        keep = keep | largest(candidates.masked_fill(out, -torch.inf), heavy)
    keep = keep | recent
    return keep if alive is None else keep & alive


def largest(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """The `counts[s]` largest finite scores of each row.

    Args:
        scores: (S, n) float; -inf is never chosen.
        counts: S numbers, which may exceed n.

    Returns:
        (S, n) bool; among equal scores `torch.topk` decides.
    """
    most = min(max(counts), scores.shape[1])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if most <= 0:
        return chosen
    if min(counts) == max(counts):
        # Their order does not matter, and to sort them takes four times as long as to find them.
        found = scores.topk(most, dim=1, sorted=False)
        return chosen.scatter(1, found.indices, found.values.isfinite())
    found = scores.topk(most, dim=1)
    rank = torch.arange(most, device=scores.device)
    wanted = rank < torch.tensor(list(counts), device=scores.device)[:, None]
    return chosen.scatter(1, found.indices, wanted & found.values.isfinite())
