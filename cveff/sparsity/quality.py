"""How well a method finds the neurons that matter, on documents it was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cveff.errors import StepError
from cveff.sparsity.collect import Document, watch
from cveff.sparsity.fitted import Fitted
from cveff.sparsity.heads import HeadPredictor
from cveff.sparsity.structure import find_mlps
from cveff.sparsity.teal import TEAL


@dataclass(frozen=True)
class Quality:
    """Means over tokens, by MLP.

    Attributes:
        recall: of as many of a token's largest |values| as the method chose, the share it chose.
        energy: share of the squared values in the neurons it chose.
        chosen: share of the neurons it chose.
        tokens: how many were read.
    """

    recall: tuple[float, ...]
    energy: tuple[float, ...]
    chosen: tuple[float, ...]
    tokens: int


@torch.no_grad()
def quality(model: nn.Module, fitted: Fitted, documents: Sequence[Document]) -> Quality:
    """Compare a method's choice with the best one, on every token of these documents.

    Choosing k neurons of a token is compared with its k largest values, so that recall equals precision, and choosing
    everything is no merit of its own: any choice of a share s finds s of them by chance.

    Raises:
        StepError: the method belongs to another network or chooses no neurons, or there are no documents.
    """
    fitted.check(model)
    method = fitted.method
    if isinstance(method, TEAL | HeadPredictor):
        raise StepError(f"{method.kind} chooses no neurons; measure the perplexity instead")
    mlps = find_mlps(model)
    tensors = [
        {name: tensor.to(mlp.down.weight.device) for name, tensor in own.items()}
        for mlp, own in zip(mlps, fitted.tensors, strict=True)
    ]
    sums = torch.zeros(4, len(mlps), dtype=torch.float64)
    seen: dict[int, Tensor] = {}

    def see(name: str, _: int, x: Tensor) -> None:
        i = int(name)
        seen[i] = x
        before = seen[max(0, i - 1)] if method.lookahead else x
        mask = method.choose(tensors[i], mlps[i], x, before)[0]
        values = mlps[i].values(x).float()
        ranks = values.abs().argsort(-1, descending=True).argsort(-1)
        counts, energy = mask.sum(-1), values.square()
        hits = (mask & (ranks < counts[:, None])).sum(-1)
        sums[0, i] += float((hits / counts.clamp(min=1)).sum())
        sums[1, i] += float(((energy * mask).sum(-1) / energy.sum(-1).clamp(min=1e-30)).sum())
        sums[2, i] += float(mask.float().mean(-1).sum())
        sums[3, i] += len(x)

    watch(model, documents, {str(i): mlp.first[0] for i, mlp in enumerate(mlps)}, see)
    recall, energy, chosen = ((part / sums[3].clamp(min=1)).tolist() for part in sums[:3])
    return Quality(tuple(recall), tuple(energy), tuple(chosen), int(sums[3].max()))
