"""Attention of one new token to keys and values of which every head keeps a different number.

The cache of (batch, key-value head) segments is flat, [tokens, D], as in Ada-KV (Feng et al., arXiv:2407.11550), with
room after each segment for tokens to come. Query heads are grouped: H / Hkv of them share a segment.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cveff.errors import KernelError
from cveff.kernels.build import library
from cveff.kernels.call import call, row_major
from cveff.kernels.choice import Choice, Implementation, choose
from cveff.kernels.decode_attention import reference

__all__ = ["choice", "decode_attention"]

SOURCE = Path(__file__).parent / "cpu.cpp"


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    received: Tensor | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v within each segment; zeros where a segment is empty.

    Args:
        q: (B, H, D) float, one query a head.
        k, v: (T, D), of `q`'s type: all segments, one after the other.
        offsets: (B·Hkv + 1,) int32, where segments begin and the last one's room ends; segment b·Hkv + h belongs to
            image or text b and to query heads h·H/Hkv up to (h+1)·H/Hkv.
        lengths: (B·Hkv,) int32, tokens of each segment that count, from its beginning.
        scale: of the scores, usually D**-0.5.
        received: (T,) float32, to which every token's mean weight over the query heads of its segment is added.
        implementation: by default the fastest that can run; `choice` says which and why.

    Returns:
        (B, H, D), of `q`'s type; sums are float32.

    Raises:
        KernelError: shapes or types do not fit, a segment leaves its room (checked on CPUs only), or the
            implementation asked for cannot run.
    """
    _check(q, k, v, offsets, lengths)
    if received is not None and (received.dtype != torch.float32 or received.shape != k.shape[:1]):
        raise KernelError(f"received is {tuple(received.shape)} {received.dtype}; give ({len(k)},) float32")
    chosen = choice(q, k, v, received, implementation=implementation).implementation
    if q.numel() == 0:
        found = torch.zeros_like(q)
    elif chosen == "reference":
        found = reference.decode_attention(q, k, v, offsets, lengths, scale, received)
    elif chosen == "triton":
        from cveff.kernels.decode_attention import triton

        found = triton.decode_attention(
            q.contiguous(), k, v, offsets.contiguous(), lengths.contiguous(), scale
        )
    else:
        compiled = library(SOURCE)
        assert compiled is not None  # `choice` built it
        found = torch.empty(q.shape, dtype=torch.float32)
        batch, heads, head_dim = q.shape
        call(
            compiled.decode_attention,
            *(k.dtype == torch.bfloat16, q.float().contiguous()),
            *(len(lengths), batch * heads // len(lengths), head_dim),
            *(k, k.stride(0), v, v.stride(0), offsets.contiguous(), lengths.contiguous()),
            *(float(scale), found, received, torch.get_num_threads()),
        )
    return found.to(q.dtype)


def choice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    received: Tensor | None = None,
    *,
    implementation: Implementation | None = None,
) -> Choice:
    """Which implementation `decode_attention` takes for these, and why.

    Raises:
        KernelError: as `decode_attention`.
    """
    found = choose([q, k, v], SOURCE, implementation)
    if found.implementation == "reference":
        return found
    if not (row_major(k) and row_major(v)):
        reason = "a row of the keys or values is not contiguous; the kernels read whole rows"
    elif received is not None and found.implementation == "triton":
        reason = "Triton's kernel does not sum what tokens receive"
    elif received is not None and not received.is_contiguous():
        reason = "`received` is not contiguous"
    else:
        return found
    if implementation is not None:
        raise KernelError(f"the {implementation} kernel cannot run: {reason}")
    return Choice("reference", reason)


def _check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, lengths: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 2 or k.shape != v.shape or k.shape[1] != q.shape[2]:
        raise KernelError(
            f"q, k and v are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; give (B, H, D), (T, D), (T, D)"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise KernelError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; give them in one type")
    if offsets.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise KernelError(f"offsets and lengths are {offsets.dtype} and {lengths.dtype}; give int32")
    if lengths.dim() != 1 or tuple(offsets.shape) != (len(lengths) + 1,):
        raise KernelError(
            f"offsets are {tuple(offsets.shape)} and lengths {tuple(lengths.shape)}; give (S + 1,) and (S,)"
        )
    if len(lengths) == 0 and q.numel():
        raise KernelError(f"q is {tuple(q.shape)}, and there is no segment; give one for each key-value head")
    if len(lengths) and (len(lengths) % max(1, len(q)) or (q.shape[0] * q.shape[1]) % len(lengths)):
        raise KernelError(
            f"{len(lengths)} segments for q {tuple(q.shape)}; the heads must be a multiple of segments / batch"
        )
    if lengths.device.type != "cpu" or len(lengths) == 0:
        return
    if int(lengths.min()) < 0 or int(offsets.min()) < 0:
        raise KernelError("a length or an offset is negative")
    room = torch.cat([offsets[1:-1], offsets.new_tensor([len(k)])]) - offsets[:-1]
    if bool((lengths > room).any()) or int(offsets[-1]) > len(k):
        segment = int((room - lengths).argmin())
        raise KernelError(
            f"segment {segment} has {int(lengths[segment])} tokens and room for {int(room[segment])} of {len(k)} rows"
        )
