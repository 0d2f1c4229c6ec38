"""One head's tokens of one sequence, on their way into or out of a group's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cveff.kv.kivi import KIVI, Packed
from cveff.kv.rule import DEAD, Rule, positions


@dataclass(frozen=True)
class PackedTokens:
    """Whole blocks of tokens in a few bits.

    Attributes:
        keys, values: b blocks along the first axis.
        codes: (b, group_size) int32, `DEAD` where a token was evicted.
        scores: (b, group_size) float32, or None.
    """

    keys: Packed
    values: Packed
    codes: Tensor
    scores: Tensor | None

    @property
    def num_blocks(self) -> int:
        """Blocks of tokens."""
        return self.codes.shape[0]

    def alive(self) -> PackedTokens:
        """Without the blocks whose tokens were all evicted."""
        some = (self.codes != DEAD).any(1)
        if bool(some.all()):
            return self
        scores = None if self.scores is None else self.scores[some]
        return PackedTokens(self.keys.index(some), self.values.index(some), self.codes[some], scores)


@dataclass(frozen=True)
class Segment:
    """Tokens that a head keeps.

    Attributes:
        index: sequence · heads + head.
        rule: what it goes on keeping.
        keys: (n, D). values: (n, E). codes: (n,) int32.
        scores: (n,) float32 sums of attention received, or None.
        anchors: (p, D), keys of the first p tokens as they were rotated in the prompt, for re-rotation, or None.
        packed: older tokens in a few bits, or None.
    """

    index: int
    rule: Rule
    keys: Tensor
    values: Tensor
    codes: Tensor
    scores: Tensor | None = None
    anchors: Tensor | None = None
    packed: PackedTokens | None = None

    @property
    def length(self) -> int:
        """Tokens that are not packed."""
        return self.keys.shape[0]

    @property
    def num_blocks(self) -> int:
        """Packed blocks."""
        return 0 if self.packed is None else self.packed.num_blocks

    def in_order(self) -> Segment:
        """With its unpacked tokens by position."""
        order = positions(self.codes).argsort()
        scores = None if self.scores is None else self.scores[order]
        return replace(
            self, keys=self.keys[order], values=self.values[order], codes=self.codes[order], scores=scores
        )

    def pack(self, storage: KIVI) -> Segment:
        """With all whole blocks beyond the residual packed; tokens have to be in order."""
        count = max(0, self.length - storage.residual) // storage.group_size
        old = None if self.packed is None else self.packed.alive()
        if count == 0:
            return replace(self, packed=old)
        end = count * storage.group_size
        blocks = (count, storage.group_size)
        new = PackedTokens(
            storage.pack_keys(self.keys[:end].unflatten(0, blocks)),
            storage.pack_values(self.values[:end].unflatten(0, blocks)),
            self.codes[:end].unflatten(0, blocks),
            None if self.scores is None else self.scores[:end].unflatten(0, blocks),
        )
        return replace(
            self,
            keys=self.keys[end:],
            values=self.values[end:],
            codes=self.codes[end:],
            scores=None if self.scores is None else self.scores[end:],
            packed=new if old is None else _joined(old, new),
        )


def stacked(segments: Sequence[Segment]) -> PackedTokens | None:
    """The packed blocks of segments that have equally many, along a new first axis."""
    parts = [segment.packed for segment in segments if segment.packed is not None]
    if not parts or not parts[0].num_blocks:
        return None

    def stack(packed: Sequence[Packed]) -> Packed:
        return Packed(*(torch.stack(tensors) for tensors in zip(*(p.tensors for p in packed), strict=True)))

    scores = [part.scores for part in parts if part.scores is not None]
    return PackedTokens(
        stack([part.keys for part in parts]),
        stack([part.values for part in parts]),
        torch.stack([part.codes for part in parts]),
        torch.stack(scores) if scores else None,
    )


def _joined(old: PackedTokens, new: PackedTokens) -> PackedTokens:
    def both(a: Packed, b: Packed) -> Packed:
        return Packed(*(torch.cat(pair) for pair in zip(a.tensors, b.tensors, strict=True)))

    scores = None
    if old.scores is not None and new.scores is not None:
        scores = torch.cat([old.scores, new.scores])
    return PackedTokens(
        both(old.keys, new.keys), both(old.values, new.values), torch.cat([old.codes, new.codes]), scores
    )
