"""Attention of one query a head to ragged keys and values in plain PyTorch: the truth of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    scale: float,
    received: Tensor | None = None,
) -> Tensor:
    """Segment by segment; arguments as the dispatcher's.

    Returns:
        (B, H, D) float32.
    """
    batch, heads, head_dim = q.shape
    queries = q.float().reshape(len(lengths), -1, head_dim)  # (B·Hkv, group, D)
    found = torch.zeros_like(queries)
    for segment, (begin, length) in enumerate(zip(offsets.tolist(), lengths.tolist(), strict=False)):
        if length:
            keys, values = k[begin : begin + length].float(), v[begin : begin + length].float()
            weights = torch.softmax(scale * queries[segment] @ keys.T, dim=-1)
            found[segment] = weights @ values
            if received is not None:
                received[begin : begin + length] += weights.mean(0)
    return found.reshape(batch, heads, head_dim)
