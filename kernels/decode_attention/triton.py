"""Attention of one query a head to ragged keys and values on a GPU, in two launches (Flash-Decoding).

Each program walks one part of one segment; lengths stay on the device, so no launch waits for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 64
_PROGRAMS = 1024
"""Enough to fill a large GPU a few times over."""
_MAX_PARTS = 64


@triton.jit
def _attend(
    q, k, v, offsets, lengths, partial, largest, total,
    scale, group, size, k_stride, v_stride, parts,
    GROUP: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    part = tl.program_id(1)
    begin = tl.load(offsets + segment).to(tl.int64)
    length = tl.load(lengths + segment)
    step = tl.cdiv(tl.cdiv(length, parts), TOKENS) * TOKENS
    first = part * step
    last = tl.minimum(first + step, length)
    head = tl.arange(0, GROUP)
    column = tl.arange(0, SIZE)
    mask = (head < group)[:, None] & (column < size)[None, :]
    query = tl.load(q + (segment * group + head[:, None]) * size + column[None, :], mask, other=0.0)
    top = tl.full([GROUP], float("-inf"), tl.float32)
    sums = tl.zeros([GROUP], tl.float32)
    found = tl.zeros([GROUP, SIZE], tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        here = token < last
        inside = here[:, None] & (column < size)[None, :]
        row = begin + token
        key = tl.load(k + row[:, None] * k_stride + column[None, :], inside, other=0.0)
        value = tl.load(v + row[:, None] * v_stride + column[None, :], inside, other=0.0)
        if DOT:
            score = tl.dot(query, tl.trans(key), input_precision="ieee")
        else:
            score = tl.sum(query.to(tl.float32)[:, None, :] * key.to(tl.float32)[None, :, :], axis=2)
        score = tl.where(here[None, :], score * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        shrink = tl.exp(top - higher)
        weight = tl.exp(score - higher[:, None])
        sums = sums * shrink + tl.sum(weight, axis=1)
        if DOT:
            added = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        else:
            added = tl.sum(weight[:, :, None] * value.to(tl.float32)[None, :, :], axis=1)
        found = found * shrink[:, None] + added
        top = higher
    place = (segment * parts + part) * group + head
    tl.store(partial + place[:, None] * size + column[None, :], found, mask)
    tl.store(largest + place, top, head < group)
    tl.store(total + place, sums, head < group)


@triton.jit
def _join(
    partial, largest, total, y, group, size, parts,
    PARTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.arange(0, PARTS)
    column = tl.arange(0, SIZE)
    place = (segment * parts + part) * group + head
    top = tl.load(largest + place, part < parts, other=float("-inf"))
    highest = tl.max(top, axis=0)
    weight = tl.exp(tl.where(top == float("-inf"), top, top - highest))
    sums = tl.sum(weight * tl.load(total + place, part < parts, other=0.0), axis=0)
    mask = (part < parts)[:, None] & (column < size)[None, :]
    found = tl.load(partial + place[:, None] * size + column[None, :], mask, other=0.0)
    found = tl.sum(weight[:, None] * found, axis=0)
    found = found / tl.where(sums == 0.0, 1.0, sums)  # an empty segment answers zeros
    tl.store(y + (segment * group + head) * size + column, found, column < size)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """As the reference; `q` is contiguous, and so are the rows of `k` and `v`.

    Returns:
        (B, H, D) float32.
    """
    batch, heads, size = q.shape
    segments = len(lengths)
    group = batch * heads // segments
    dot = group >= 4
    padded = max(16, triton.next_power_of_2(group)) if dot else triton.next_power_of_2(group)
    width = max(16, triton.next_power_of_2(size))
    parts = max(1, min(_MAX_PARTS, triton.cdiv(_PROGRAMS, segments)))
    tokens = _TOKENS if dot or padded * width <= 256 else 32
    device = q.device
    partial = torch.empty(segments, parts, group, size, device=device, dtype=torch.float32)
    largest = torch.empty(segments, parts, group, device=device, dtype=torch.float32)
    total = torch.empty_like(largest)
    found = torch.empty(batch, heads, size, device=device, dtype=torch.float32)
    _attend[(segments, parts)](
        q, k, v, offsets, lengths, partial, largest, total,
        scale, group, size, k.stride(0), v.stride(0), parts,
        GROUP=padded, SIZE=width, TOKENS=tokens, DOT=dot,
    )  # fmt: skip
    _join[(segments, group)](
        partial, largest, total, found, group, size, parts, PARTS=triton.next_power_of_2(parts), SIZE=width
    )
    return found
