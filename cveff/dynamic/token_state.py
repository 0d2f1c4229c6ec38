"""`Tokens`: what travels between the blocks of a vision transformer whose tokens are reduced on the way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

LEAK = 1e-6
"""Share of its attention a masked token keeps, so that the gradient of the logarithm stays finite."""


class Choice(nn.Identity):
    """Indices (B, k) int64 that the network chose by comparing. Rounding can turn a near tie, so who compares an engine
    with PyTorch shows PyTorch the engine's choice by a hook here."""


class Tokens(NamedTuple):
    """The tokens and what is known of them; every step returns a new one.

    N = `prefix` + n: class, distillation and register tokens stand first and are never reduced, n patch tokens follow.

    Attributes:
        x: (B, N, C) float.
        prefix: number of protected tokens.
        size: (B, n) float32, how many patches each token stands for; None: one each.
        proportional: attention sees a token of size s as s tokens.
        source: (B, n0) int64, for each of the first n0 patch tokens the one that stands for it now, or n0 + i for
            the i-th of those set aside; None: the dense map is not restored.
        aside: dropped tokens (B, d, C) that nothing stands for; kept only with `source`.
        rope: rotary embeddings, (n0, 2·D), or (B, 1, n, 2·D) once tokens were reduced; None: none.
        mask: (B, n) 1 for tokens that are kept and 0 for the others, in training of DynamicViT; None: all are kept.
    """

    x: Tensor
    prefix: int
    size: Tensor | None = None
    proportional: bool = False
    source: Tensor | None = None
    aside: tuple[Tensor, ...] = ()
    rope: Tensor | None = None
    mask: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """(B, n, C)."""
        return self.x[:, self.prefix :]

    @property
    def num_patches(self) -> int:
        """n."""
        return self.x.shape[1] - self.prefix

    def with_patches(self, patches: Tensor) -> Tensor:
        """The protected tokens, then `patches` (B, k, C)."""
        return torch.cat((self.x[:, : self.prefix], patches), dim=1) if self.prefix else patches

    def bias(self) -> Tensor | None:
        """What is added to attention's logits: log size (ToMe, section 3), or the mask (DynamicViT, equation 11)."""
        if self.mask is not None:
            return _mask_bias(self.mask, self.prefix).to(self.x.dtype)
        if self.size is None or not self.proportional:
            return None
        bias = torch.nn.functional.pad(self.size.log(), (self.prefix, 0))
        return bias.to(self.x.dtype)[:, None, None]  # (B, 1, 1, N)

    def rope_rows(self) -> Tensor | None:
        """Rotary embeddings as rows (B, n, 2·D)."""
        if self.rope is None:
            return None
        if self.rope.ndim == 2:
            return self.rope.expand(self.x.shape[0], -1, -1)
        return self.rope[:, 0]

    def restored(self) -> Tensor:
        """(B, prefix + n0, C): each of the first patch tokens is what stands for it, or was when it was dropped."""
        if self.source is None:
            return self.x
        rows, source = self.patches, self.source
        if self.aside:
            count = source.shape[1]
            rows = torch.cat((rows, *self.aside), dim=1)
            source = torch.where(source < count, source, source - count + self.num_patches)
        return self.with_patches(gather_rows(rows, source))


def begin(x: Tensor, prefix: int, rope: Tensor | None, restore: bool) -> Tokens:
    """Tokens before the first block; `restore` says whether `restored` will be asked for."""
    source = None
    if restore:
        source = torch.arange(x.shape[1] - prefix, device=x.device).expand(x.shape[0], -1)
    return Tokens(x, prefix, source=source, rope=rope)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[b, index[b, i]]` of (B, n, C) and (B, k) int64, as (B, k, C).

    One Gather of whole rows: ONNX Runtime copies them, where GatherElements would look up every number by itself.
    """
    batch, count, width = x.shape
    start = torch.arange(batch, device=x.device)[:, None] * count
    rows = x.reshape(batch * count, width).index_select(0, (index + start).reshape(-1))
    return rows.reshape(batch, index.shape[1], width)


def move(source: Tensor, places: Tensor) -> Tensor:
    """`Tokens.source` after tokens moved.

    Args:
        places: (B, n) int64, the new index of each token there was; from n0 on for those set aside.
    """
    inside = source < source.shape[1]
    moved = places.gather(1, source.clamp(max=places.shape[1] - 1))
    return torch.where(inside, moved, source)


def _mask_bias(mask: Tensor, prefix: int) -> Tensor:
    """(B, 1, N, N): masked columns are closed to all but the token itself."""
    full = torch.nn.functional.pad(mask, (prefix, 0), value=1.0)
    logs = (full + LEAK).log()[:, None, None]  # (B, 1, 1, N)
    own = torch.eye(full.shape[1], device=mask.device, dtype=torch.bool)
    return torch.where(own, torch.zeros_like(logs), logs)
