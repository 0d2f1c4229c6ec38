"""DynamicViT (Rao et al., arXiv:2106.02034): small predictors, learned with the network, say which tokens stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.dynamic.evit import ROUNDING, follow
from cveff.dynamic.token_state import Choice, Tokens, gather_rows


class KeepPredicted(nn.Module):
    """Before a block, keep the ⌊`ratio` · n0⌋ patch tokens a predictor scores highest, of n0 at first (section 3.2).

    In training nothing is dropped: a mask drawn by Gumbel-softmax (equation 9) closes attention to the tokens that
    would go, and they stay as they are. A token once masked stays so (equation 7).

    Args:
        width: C of the tokens.
        ratio: share of the first block's tokens that stay, 0 to 1.
    """

    is_before_block = True

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.order = Choice()
        self.local = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        half, quarter = max(1, width // 2), max(1, width // 4)
        self.score = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )

    def remaining(self, count: int, first_count: int) -> int:
        """Patch tokens after this predictor, of `count` before it and `first_count` in the first block."""
        return min(count, max(1, int(self.ratio * first_count + ROUNDING)))

    def logits(self, patches: Tensor, mask: Tensor | None) -> Tensor:
        """(B, n, 2): for keeping and for dropping each of `patches` (B, n, C), of which `mask` (B, n) are left.

        One half of the features is each token's own, the other their mean over the tokens that are left
        (equations 1 to 4).
        """
        features = self.local(patches)
        half = features.shape[-1] // 2
        own, shared = features[..., :half], features[..., half:]
        if mask is None:
            mean = shared.mean(dim=1, keepdim=True)
        else:
            left = mask[..., None].to(shared.dtype)
            mean = (shared * left).sum(dim=1, keepdim=True) / left.sum(dim=1, keepdim=True).clamp_min(1)
        scores: Tensor = self.score(torch.cat((own, mean.expand_as(shared)), dim=-1))
        return scores

    def forward(self, tokens: Tokens, first_count: int) -> Tokens:
        """
        Args:
            first_count: patch tokens in the first block, n0.
        """
        logits = self.logits(tokens.patches, tokens.mask)
        if self.training:
            return tokens._replace(mask=self.draw(logits, tokens.mask))
        kept = self.remaining(tokens.num_patches, first_count)
        keep = logits[..., 0] - logits[..., 1]
        order = self.order(keep.topk(tokens.num_patches, dim=-1).indices)
        rows = gather_rows(tokens.patches, order)
        source, aside = follow(tokens, order, rows, kept, fuse=False)
        rope = tokens.rope_rows()
        if rope is not None:
            rope = gather_rows(rope, order[:, :kept])[:, None]
        return tokens._replace(x=tokens.with_patches(rows[:, :kept]), source=source, aside=aside, rope=rope)

    def draw(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """(B, n) 0 or 1, with the gradient of the soft choice; a module's method, so that a hook can see it."""
        chosen = F.gumbel_softmax(logits.float(), hard=True, dim=-1)[..., 0]
        return chosen if mask is None else chosen * mask
