"""Heads that keep about as many tokens, side by side in one dense tensor: appended to, attended, evicted in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cveff.kernels.decode_attention import choice, decode_attention
from cveff.kernels.evict_tokens import can_run, evict_tokens
from cveff.kv.kivi import KIVI
from cveff.kv.prompt import CHUNK
from cveff.kv.rotation import Rotation
from cveff.kv.rule import DEAD, PINNED, keep_mask
from cveff.kv.segment import PackedTokens, Segment, stacked
from cveff.kv.step import Step


class Group:
    """S segments in tensors (S, capacity, …).

    A slot's code holds its token's position; the order of slots is of no importance to attention, so an evicted
    token's slot is filled with the last one's, and nothing else moves.

    Args:
        segments: of equal number of packed blocks and anchors, all with scores or all without.
        capacity: slots a segment, packed ones apart.
        num_heads: H, to find a segment's sequence.
        storage: how packed blocks are read.
    """

    def __init__(
        self, segments: Sequence[Segment], capacity: int, num_heads: int, storage: KIVI | None
    ) -> None:
        first = segments[0]
        self._storage = storage
        self.rules = [segment.rule for segment in segments]
        self.lengths = [segment.length for segment in segments]
        self.indices = [segment.index for segment in segments]
        self.rows = [segment.index // num_heads for segment in segments]
        self._is_all = self.indices == list(range(len(segments)))
        device = first.keys.device
        self._index = torch.tensor(self.indices, device=device)
        self._rows = torch.tensor(self.rows, device=device)
        self._tags = torch.tensor([rule.tags for rule in self.rules], device=device, dtype=torch.uint8)[
            :, None
        ]
        count = len(segments)
        # Free slots are masked, and 0 · NaN would show through a mask: they have to be finite.
        self._keys = first.keys.new_zeros(count, capacity, first.keys.shape[1])
        self._values = first.values.new_zeros(count, capacity, first.values.shape[1])
        self._codes = first.codes.new_full((count, capacity), DEAD)
        self._scores = None if first.scores is None else first.scores.new_zeros(count, capacity)
        for place, segment in enumerate(segments):
            self._keys[place, : segment.length] = segment.keys
            self._values[place, : segment.length] = segment.values
            self._codes[place, : segment.length] = segment.codes
            if self._scores is not None and segment.scores is not None:
                self._scores[place, : segment.length] = segment.scores
        anchors = [segment.anchors for segment in segments if segment.anchors is not None]
        self._anchors = torch.stack(anchors) if anchors else None
        self._packed = stacked(segments)

    @property
    def capacity(self) -> int:
        """Slots a segment, packed ones apart."""
        return self._keys.shape[1]

    @property
    def evicts(self) -> bool:
        """Whether any of its rules drops tokens."""
        return any(rule.evicts for rule in self.rules)

    def tensors(self) -> Iterator[Tensor]:
        """All that is held."""
        yield from (self._keys, self._values, self._codes)
        for extra in (self._scores, self._anchors):
            if extra is not None:
                yield extra
        if self._packed is not None:
            yield from (*self._packed.keys.tensors, *self._packed.values.tensors, self._packed.codes)
            if self._packed.scores is not None:
                yield self._packed.scores

    @property
    def live_nbytes(self) -> int:
        """Bytes of slots in use: keys, values, int32 codes, float32 scores, anchors, and packed blocks."""
        slots = [t for t in (self._keys, self._values, self._codes, self._scores) if t is not None]
        in_slots = sum(t[0, 0].numel() * t.element_size() for t in slots) * sum(self.lengths)
        whole = sum(t.numel() * t.element_size() for t in self.tensors())
        return in_slots + whole - sum(t.numel() * t.element_size() for t in slots)

    def kept(self) -> list[int]:
        """Tokens of each segment that attention sees."""
        if self._packed is None:
            return list(self.lengths)
        alive = (self._packed.codes != DEAD).flatten(1).sum(1).tolist()
        return [length + packed for length, packed in zip(self.lengths, alive, strict=True)]

    def take(self, place: int) -> Segment:
        """A segment as it is now, its unpacked tokens by position."""
        end = self.lengths[place]
        packed = self._packed
        return Segment(
            self.indices[place],
            self.rules[place],
            self._keys[place, :end],
            self._values[place, :end],
            self._codes[place, :end],
            None if self._scores is None else self._scores[place, :end],
            None if self._anchors is None else self._anchors[place],
            None
            if packed is None
            else PackedTokens(
                packed.keys.index(place),
                packed.values.index(place),
                packed.codes[place],
                None if packed.scores is None else packed.scores[place],
            ),
        ).in_order()

    def contents(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (n, D), values (n, E) and positions (n,) of a segment by position, packed ones unpacked."""
        segment = self.take(place)
        keys, values, codes = [segment.keys], [segment.values], [segment.codes]
        if segment.packed is not None and self._storage is not None:
            seen = segment.packed.codes.flatten() != DEAD
            keys.insert(0, self._storage.unpack_keys(segment.packed.keys).flatten(0, 1)[seen])
            values.insert(0, self._storage.unpack_values(segment.packed.values).flatten(0, 1)[seen])
            codes.insert(0, segment.packed.codes.flatten()[seen])
        places = torch.cat(codes) & (PINNED - 1)
        order = places.argsort()
        return torch.cat(keys)[order], torch.cat(values)[order], places[order]

    def append(self, step: Step) -> Tensor | None:
        """Write a step's tokens behind the others.

        Returns:
            (S, capacity) which of the T new tokens a slot holds, -1 for older ones; None where T is 1.
        """
        codes = step.places[self._rows]
        codes = torch.where((step.tags[self._rows] & self._tags) != 0, codes | PINNED, codes)
        keys, values = self._mine(step.keys), self._mine(step.values)
        if step.length == 1:
            end = self.lengths[0]
            if self.lengths.count(end) == len(self.lengths):
                self._keys[:, end], self._values[:, end], self._codes[:, end] = (
                    keys[:, 0],
                    values[:, 0],
                    codes[:, 0],
                )
            else:
                slots = torch.tensor(self.lengths, device=keys.device)
                lines = torch.arange(len(self.lengths), device=keys.device)
                self._keys[lines, slots] = keys[:, 0]
                self._values[lines, slots] = values[:, 0]
                self._codes[lines, slots] = codes[:, 0]
            self.lengths = [length + 1 for length in self.lengths]
            return None
        origin = torch.full_like(self._codes, -1)
        for place, row in enumerate(self.rows):
            new = torch.arange(step.length, device=keys.device)
            if step.valid is not None:
                new = new[step.valid[row]]
            span = slice(self.lengths[place], self.lengths[place] + len(new))
            self._keys[place, span] = keys[place, new]
            self._values[place, span] = values[place, new]
            self._codes[place, span] = codes[place, new]
            origin[place, span] = new.to(origin.dtype)
            self.lengths[place] = span.stop
        return origin

    def attend(self, queries: Tensor, step: Step, scale: float) -> Tensor:
        """Append a step's tokens and attend to all that is kept.

        Args:
            queries: (N, g, T, D).
            step: the tokens the queries belong to.
            scale: factor of the products.

        Returns:
            (S, g, T, E).
        """
        origin = self.append(step)
        end = max(self.lengths)
        keys, values = self._keys[:, :end], self._values[:, :end]
        if self._packed is not None and self._storage is not None:
            keys = torch.cat([self._storage.unpack_keys(self._packed.keys).flatten(1, 2), keys], dim=1)
            values = torch.cat(
                [self._storage.unpack_values(self._packed.values).flatten(1, 2), values], dim=1
            )
        queries = self._mine(queries)
        if step.length == 1 and self._packed is None and self._has_kernel(queries):
            return self._decode(queries, scale)
        parts = []
        for first in range(0, step.length, CHUNK):
            last = min(first + CHUNK, step.length)
            mask = self._mask(step, origin, first, last, end)
            rows = queries[:, :, first:last]
            parts.append(self._attend(rows, keys, values, mask, scale, self._counted(step, first, last)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _has_kernel(self, queries: Tensor) -> bool:
        is_dense = self._scores is None and min(self.lengths) == max(self.lengths)
        if (
            is_dense or self._keys.shape != self._values.shape
        ):  # PyTorch's own is as fast where nothing is ragged
            return False
        keys, values = self._keys.flatten(0, 1), self._values.flatten(0, 1)
        scores = None if self._scores is None else self._scores.flatten()
        return choice(queries[:, :, 0], keys, values, scores).implementation != "reference"

    def _decode(self, queries: Tensor, scale: float) -> Tensor:
        """Attention of the newest token alone, which reads nothing but the slots in use."""
        device, count = queries.device, len(self.indices)
        offsets = torch.arange(
            0, (count + 1) * self.capacity, self.capacity, dtype=torch.int32, device=device
        )
        found = decode_attention(
            queries[:, :, 0],
            self._keys.flatten(0, 1),
            self._values.flatten(0, 1),
            offsets,
            torch.tensor(self.lengths, dtype=torch.int32, device=device),
            scale,
            received=None if self._scores is None else self._scores.flatten(),
        )
        return found[:, :, None]

    def evict(self, seen: Sequence[int], rotation: Rotation | None) -> None:
        """Drop what the rules do not keep.

        Args:
            seen: tokens seen so far, for each sequence.
            rotation: moves anchors on; needed where the rules re-rotate.
        """
        if not self.evicts:
            return
        mine = [seen[row] for row in self.rows]
        if self._packed is None and can_run(self._keys, self._values, self._codes, self._scores):
            lengths = torch.tensor(self.lengths)
            rules = torch.tensor([rule.numbers(s) for rule, s in zip(self.rules, mine, strict=True)])
            evict_tokens(rules, self._keys, self._values, self._codes, self._scores, lengths)
            self.lengths = lengths.tolist()
        else:
            self._evict(mine)
        self.rotate(seen, rotation)

    def _evict(self, mine: Sequence[int]) -> None:
        """The same in PyTorch, packed tokens included; `mine`: tokens seen by each segment."""
        end = max(self.lengths)
        codes, scores = self._codes[:, :end], None if self._scores is None else self._scores[:, :end]
        lengths = torch.tensor(self.lengths, device=codes.device)[:, None]
        slots = torch.arange(end, device=codes.device)
        alive = slots < lengths
        skip = 0
        if self._packed is not None:
            packed = self._packed.codes.flatten(1)
            skip = packed.shape[1]
            codes, alive = torch.cat([packed, codes], 1), torch.cat([packed != DEAD, alive], 1)
            if scores is not None and self._packed.scores is not None:
                scores = torch.cat([self._packed.scores.flatten(1), scores], 1)
        keep = keep_mask(codes, scores, self.rules, mine, alive)
        if self._packed is not None:
            self._packed.codes.masked_fill_(~keep[:, :skip].unflatten(1, self._packed.codes.shape[1:]), DEAD)
        keep = keep[:, skip:]
        left = keep.sum(1)
        self.lengths = left.tolist()
        # As many slots are free below a segment's new length as are in use above it.
        free = (~keep & (slots < left[:, None])).nonzero(as_tuple=True)
        used = (keep & (slots >= left[:, None])).nonzero(as_tuple=True)
        for tensor in (self._keys, self._values, self._codes, self._scores):
            if tensor is not None and len(free[0]):
                tensor[free] = tensor[used]
        if self._scores is not None:
            # A slot that is written to next begins without attention received.
            self._scores[:, :end].masked_fill_(slots >= left[:, None], 0)

    def rotate(self, seen: Sequence[int], rotation: Rotation | None) -> None:
        """Move anchors on by the number of tokens evicted so far."""
        if self._anchors is None or rotation is None or not self._anchors.shape[1]:
            return
        shifts = [seen[row] - length for row, length in zip(self.rows, self.lengths, strict=True)]
        turned = rotation(self._anchors, torch.tensor(shifts, device=self._keys.device))
        self._keys[:, : self._anchors.shape[1]] = turned

    def _mine(self, tensor: Tensor) -> Tensor:
        """Lines of this group, out of (N, …)."""
        return tensor if self._is_all and len(self.indices) == tensor.shape[0] else tensor[self._index]

    def _mask(self, step: Step, origin: Tensor | None, first: int, last: int, end: int) -> Tensor | None:
        """(S, rows, packed + end) bool, or None where every query sees every slot."""
        if origin is None and self._packed is None and min(self.lengths) == end:
            return None
        slots = torch.arange(end, device=self._keys.device)
        alive = slots < torch.tensor(self.lengths, device=self._keys.device)[:, None]
        mask = alive[:, None].expand(-1, last - first, -1)
        if origin is not None:
            new = origin[:, None, :end].long()
            visible = step.visible()[self._rows, first:last]  # (S, rows, T)
            mask = mask & ((new < 0) | visible.gather(2, new.clamp(min=0).expand(-1, last - first, -1)))
        if self._packed is not None:
            packed = (self._packed.codes != DEAD).flatten(1)[:, None].expand(-1, last - first, -1)
            mask = torch.cat([packed, mask], dim=2)
        return mask

    def _counted(self, step: Step, first: int, last: int) -> Tensor | None:
        """(S, rows) which queries add to the scores; None: all."""
        return None if step.valid is None else step.valid[self._rows, first:last]

    def _attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        scale: float,
        counted: Tensor | None,
    ) -> Tensor:
        count, group, rows, _ = queries.shape
        flat = queries.reshape(count, group * rows, -1)
        if mask is not None:
            mask = mask[:, None].expand(-1, group, -1, -1).reshape(count, group * rows, -1)
        if self._scores is None:
            out = F.scaled_dot_product_attention(
                flat[:, None],
                keys[:, None],
                values[:, None],
                attn_mask=None if mask is None else mask[:, None],
                scale=scale,
            )[:, 0]
            return out.view(count, group, rows, -1)
        logits = torch.matmul(flat, keys.transpose(1, 2)).float() * scale
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        probabilities = logits.softmax(-1)
        received = probabilities.view(count, group, rows, -1).mean(1)
        if counted is not None:
            received = received * counted[:, :, None]
        self._add_scores(received.sum(1))
        return torch.matmul(probabilities.to(values.dtype), values).view(count, group, rows, -1)

    def _add_scores(self, received: Tensor) -> None:
        skip = 0
        if self._packed is not None and self._packed.scores is not None:
            skip = self._packed.scores[0].numel()
            self._packed.scores.add_(received[:, :skip].unflatten(1, self._packed.scores.shape[1:]))
        if self._scores is not None:
            self._scores[:, : received.shape[1] - skip] += received[:, skip:]
