"""`RaggedKV`: the keys and values of one layer, where every head of every sequence has a length of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cveff.kv.group import Group
from cveff.kv.kivi import KIVI
from cveff.kv.rotation import Rotation
from cveff.kv.rule import Rule, positions
from cveff.kv.segment import Segment
from cveff.kv.step import Step


class RaggedKV:
    """Segments, one for each sequence and key-value head, in groups of about equal length.

    Segments whose lengths differ by no more than `slack` share a dense tensor that has `slack` free slots behind
    the longest; so no more than 2 · slack slots a segment are allocated in vain, tokens are appended in place, and
    attention is one call a group. Where a group is full, the layer is laid out anew.

    Args:
        segments: in the order of sequences, then heads.
        num_heads: H.
        seen: tokens of each sequence so far.
        slack: slots.
        storage: how older tokens are packed, or None.
        rotation: for rules that re-rotate.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        num_heads: int,
        seen: Sequence[int],
        slack: int,
        storage: KIVI | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        self._num_heads, self._slack, self._storage, self._rotation = num_heads, slack, storage, rotation
        self.seen = list(seen)
        self.groups = self._arranged(segments, slack)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.untyped_storage().nbytes() for group in self.groups for t in group.tensors())

    @property
    def live_nbytes(self) -> int:
        """Bytes in use."""
        return sum(group.live_nbytes for group in self.groups)

    def kept(self) -> list[list[int]]:
        """Tokens that each head of each sequence keeps, [B][H]."""
        flat = [0] * (len(self.seen) * self._num_heads)
        for group in self.groups:
            for index, length in zip(group.indices, group.kept(), strict=True):
                flat[index] = length
        return [flat[at : at + self._num_heads] for at in range(0, len(flat), self._num_heads)]

    def contents(self, row: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (n, D), values (n, E) and positions (n,) of a head, by position."""
        index = row * self._num_heads + head
        for group in self.groups:
            if index in group.indices:
                return group.contents(group.indices.index(index))
        raise IndexError(f"there is no sequence {row} with a head {head}")

    def attend(self, queries: Tensor, step: Step, scale: float) -> Tensor:
        """Append a step's tokens, attend to what is kept, then evict by the rules.

        Args:
            queries: (N, g, T, D).
            step: the new tokens.
            scale: factor of the products.

        Returns:
            (N, g, T, E).
        """
        if any(group.capacity - max(group.lengths) < step.length for group in self.groups):
            segments = [group.take(place) for group in self.groups for place in range(len(group.indices))]
            self.groups = self._arranged(segments, max(self._slack, step.length))
        count = [step.length] * len(self.seen) if step.valid is None else step.valid.sum(1).tolist()
        self.seen = [before + new for before, new in zip(self.seen, count, strict=True)]
        if len(self.groups) == 1:
            out = self.groups[0].attend(queries, step, scale)
            order = self.groups[0].indices
            if order != list(range(len(order))):
                out = torch.empty_like(out).index_copy_(0, torch.tensor(order, device=out.device), out)
        else:
            out = queries.new_empty(*queries.shape[:3], step.values.shape[-1])
            for group in self.groups:
                out[torch.tensor(group.indices, device=out.device)] = group.attend(queries, step, scale)
        for group in self.groups:
            group.evict(self.seen, self._rotation)
        return out

    def _arranged(self, segments: Sequence[Segment], slack: int) -> list[Group]:
        if self._storage is not None:
            segments = [segment.pack(self._storage) for segment in segments]
        batches: list[list[Segment]] = []
        for segment in sorted(segments, key=lambda s: (*_kind(s), s.length, s.index)):
            last = batches[-1] if batches else None
            if last and _kind(last[0]) == _kind(segment) and segment.length - last[0].length <= self._slack:
                last.append(segment)
            else:
                batches.append([segment])
        groups = []
        for batch in batches:
            batch = sorted(batch, key=lambda s: s.index)
            capacity = max(segment.length for segment in batch) + slack
            groups.append(Group(batch, capacity, self._num_heads, self._storage))
            groups[-1].rotate(self.seen, self._rotation)
        return groups


def _kind(segment: Segment) -> tuple[bool, bool, int, int]:
    """What segments of a group have in common."""
    anchors = -1 if segment.anchors is None else len(segment.anchors)
    return segment.scores is not None, segment.rule.evicts, anchors, segment.num_blocks


def first_segments(
    keys: Tensor,
    values: Tensor,
    keep: Tensor,
    codes: Tensor,
    scores: Tensor | None,
    rules: Sequence[Rule],
    row: int,
) -> list[Segment]:
    """Segments of a sequence at the end of its prefill.

    Args:
        keys: (H, n, D). values: (H, n, E). keep: (H, n) bool. codes: (H, n) int32. scores: (H, n) or None.
        rules: H of them.
        row: index of the sequence.
    """
    found = []
    for head, rule in enumerate(rules):
        chosen = keep[head].nonzero()[:, 0]
        kept = codes[head, chosen]
        anchors = None
        if rule.rerotate:
            anchors = keys[head, chosen[kept != positions(kept)]]
        found.append(
            Segment(
                row * len(rules) + head,
                rule,
                keys[head, chosen],
                values[head, chosen],
                kept,
                scores[head, chosen] if scores is not None and rule.needs_scores else None,
                anchors,
            )
        )
    return found
