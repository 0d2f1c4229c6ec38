"""Token merging (ToMe: Bolya et al., arXiv:2210.09461): in each block the most similar pairs of tokens become one.

Written from the paper. What it is made of was chosen by the time it takes in ONNX Runtime: rows are gathered whole,
sums are a product with a one-hot matrix, and the one sort is a TopK; nothing has a shape that depends on the image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.dynamic.token_state import Choice, Tokens, gather_rows, move
from cveff.dynamic.token_vit import Attended

TINY = 1e-6
"""Smallest length of a key that is divided by; above zero in float16 too."""


class MergeTokens(nn.Module):
    """Merge `r` patch tokens into others, between attention and MLP (section 3).

    Every second token (A) looks for the most similar of the others (B) by the cosine of keys averaged over heads;
    the r best pairs are merged as `x = Σ size · x / Σ size`. With fewer than 2r tokens half of them are merged.

    Args:
        r: tokens that go.
        proportional: attention sees a token of size s as s tokens (equation 1).
    """

    is_before_block = False

    def __init__(self, r: int, proportional: bool = True) -> None:
        super().__init__()
        self.r, self.proportional = r, proportional
        self.best, self.order = Choice(), Choice()

    def remaining(self, count: int, first_count: int) -> int:
        """Patch tokens after this block, of `count` before it."""
        return count - min(self.r, count // 2)

    def match(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """How similar each token of A is to its best in B, and which that is: (B, na) float and int64.

        Args:
            a, b: unit vectors (B, na, D) and (B, nb, D).
        """
        return (a @ b.transpose(1, 2)).max(dim=-1)

    def forward(self, tokens: Tokens, attended: Attended) -> Tokens:
        """`tokens` after the attention half of a block, with r fewer."""
        count, prefix = tokens.num_patches, tokens.prefix
        r = count - self.remaining(count, count)
        if r == 0:
            return tokens
        keys = attended.content.mean(dim=1)  # (B, N, D)
        keys = keys / keys.norm(dim=-1, keepdim=True).clamp_min(TINY)
        similarity, best = self.match(keys[:, prefix::2], keys[:, prefix + 1 :: 2])
        best, order = self.best(best), self.order(similarity.topk(similarity.shape[1], dim=-1).indices)
        go, stay = order[:, :r], order[:, r:]
        if stay.shape[1]:
            stay = _ascending(
                stay
            )  # in the image's order, so that the next block's A and B are neighbours again
        to = best.gather(1, go)
        size = tokens.size
        if size is None:
            size = torch.ones(similarity.shape[0], count, device=to.device)
        size_a, size_b = size[:, ::2], size[:, 1::2]
        # Rows of A are taken from where they are: an own copy of A would cost as much as the merging.
        x = tokens.x
        gone, kept = gather_rows(x, prefix + 2 * go), gather_rows(x, prefix + 2 * stay)
        merged, merged_size = _merge(x[:, prefix + 1 :: 2], gone, size_b, size_a.gather(1, go), to)
        rope, source = tokens.rope_rows(), tokens.source
        if rope is not None:  # a merged token is where the one of B was
            rope = torch.cat((gather_rows(rope[:, ::2], stay), rope[:, 1::2]), dim=1)[:, None]
        return tokens._replace(
            x=torch.cat((x[:, :prefix], kept, merged), dim=1),
            size=torch.cat((size_a.gather(1, stay), merged_size), dim=1),
            proportional=self.proportional,
            source=None if source is None else move(source, _places(go, stay, to, count)),
            rope=rope,
        )


def _merge(b: Tensor, a: Tensor, size_b: Tensor, size_a: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `b` (B, nb, C) with those of `a` (B, r, C) merged into number `to` (B, r), and their sizes."""
    onto = to[:, None] == torch.arange(b.shape[1], device=to.device)[:, None]  # (B, nb, r)
    added = onto * size_a[:, None]
    size = size_b + added.sum(dim=-1)
    # Sizes are divided before the product, on the smaller matrix; a token nothing joins is multiplied by exactly 1.
    share = (added / size[..., None]).to(b.dtype)
    return b * (size_b / size)[..., None].to(b.dtype) + share @ a, size


def _ascending(index: Tensor) -> Tensor:
    """Each row (B, k) of indices sorted; by TopK, as ONNX has no sort."""
    return -((-index.to(torch.int32)).topk(index.shape[1], dim=-1).values).to(torch.int64)


def _places(go: Tensor, stay: Tensor, to: Tensor, count: int) -> Tensor:
    """(B, count) where each token is afterwards: those of A that stay come first, then all of B."""
    kept, num_b = stay.shape[1], count // 2
    numbers = torch.arange(kept + num_b, device=go.device).expand(go.shape[0], -1)
    of_a = torch.zeros_like(torch.cat((stay, go), dim=1))
    of_a = of_a.scatter(1, torch.cat((stay, go), dim=1), torch.cat((numbers[:, :kept], kept + to), dim=1))
    of_b = F.pad(numbers[:, kept:], (0, of_a.shape[1] - num_b))
    return torch.stack((of_a, of_b), dim=-1).flatten(1)[:, :count]
