"""EViT (Liang et al., arXiv:2202.07800): tokens the class token does not look at are dropped, or fused into one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cveff.dynamic.token_state import Choice, Tokens, gather_rows, move
from cveff.dynamic.token_vit import Attended

ROUNDING = 1e-9
"""0.1 · 30 is a little more than 3 in floating point, and 0.7² · 100 a little less than 49."""


class KeepAttended(nn.Module):
    """Keep the ⌈`keep_rate` · n⌉ most attended patch tokens, between attention and MLP (section 3.2).

    The score is the class token's attention to a patch, averaged over heads. In a network without class token the
    mean of all queries asks in its place, which the paper does not have.

    Args:
        keep_rate: share of tokens that stay, 0 to 1.
        fuse: one more token is the attention-weighted mean of those that go (equation 6).
        has_class_token: the first token is the class token.
    """

    is_before_block = False

    def __init__(self, keep_rate: float, fuse: bool = True, has_class_token: bool = True) -> None:
        super().__init__()
        self.keep_rate, self.fuse, self.has_class_token = keep_rate, fuse, has_class_token
        self.order = Choice()

    def remaining(self, count: int, first_count: int) -> int:
        """Patch tokens after this block, of `count` before it."""
        kept = self._kept(count)
        return kept + 1 if self.fuse and kept < count else kept

    def scores(self, queries: Tensor, keys: Tensor, prefix: int) -> Tensor:
        """(B, n): how much each patch token is attended to.

        Args:
            queries, keys: (B, heads, N, D).
        """
        query = queries[:, :, :1] if self.has_class_token else queries.mean(dim=2, keepdim=True)
        logits = query @ keys.transpose(2, 3) * keys.shape[-1] ** -0.5  # (B, heads, 1, N)
        return logits.softmax(dim=-1).mean(dim=1)[:, 0, prefix:]

    def forward(self, tokens: Tokens, attended: Attended) -> Tokens:
        """`tokens` after the attention half of a block, without the least attended."""
        count = tokens.num_patches
        kept = self._kept(count)
        if self.remaining(count, count) >= count:  # fusing a single token saves none
            return tokens
        score = self.scores(attended.queries, attended.keys, tokens.prefix)
        order = self.order(score.topk(count, dim=-1).indices)
        score = score.gather(1, order)
        rows = gather_rows(tokens.patches, order)
        rope = tokens.rope_rows()
        # The fused token has no place of its own: it is given that of the most attended among its parts.
        length = kept + 1 if self.fuse else kept
        if rope is not None:
            rope = gather_rows(rope, order[:, :length])[:, None]
        patches, aside, source = rows[:, :kept], tokens.aside, tokens.source
        if self.fuse:
            weight = score[:, kept:] / score[:, kept:].sum(dim=-1, keepdim=True)
            fused = weight.to(rows.dtype)[:, None] @ rows[:, kept:]
            patches = torch.cat((patches, fused), dim=1)
        if source is not None:
            source, aside = follow(tokens, order, rows, kept, self.fuse)
        return tokens._replace(x=tokens.with_patches(patches), source=source, aside=aside, rope=rope)

    def _kept(self, count: int) -> int:
        return max(1, math.ceil(self.keep_rate * count - ROUNDING))


def follow(
    tokens: Tokens, order: Tensor, rows: Tensor, kept: int, fuse: bool
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """`source` and `aside` after the first `kept` tokens of `order` (B, n) stay, and the others are fused or dropped.

    Args:
        rows: the patch tokens in that order, (B, n, C).
    """
    if tokens.source is None:
        return None, tokens.aside
    number = torch.arange(order.shape[1], device=order.device)
    if fuse:
        number = number.clamp(max=kept)
    else:
        already = sum(part.shape[1] for part in tokens.aside)
        number = torch.where(number < kept, number, number - kept + tokens.source.shape[1] + already)
    places = torch.zeros_like(order).scatter(1, order, number.expand_as(order))
    aside = tokens.aside if fuse else (*tokens.aside, rows[:, kept:])
    return move(tokens.source, places), aside
