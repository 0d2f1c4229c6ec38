"""`Predictor`: two small linear layers guess which neurons a token needs (Deja Vu: Liu et al., arXiv:2310.17157)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.errors import StepError
from cveff.sparsity.collect import Document, split_documents, watch
from cveff.sparsity.method import Tensors, check_keep, kept_of, largest
from cveff.sparsity.structure import Mlp

_BALANCE = 0.005


@dataclass(frozen=True)
class Predictor:
    """Logits U (D x) + b of every neuron; the `keep` largest of a token are computed.

    Labels are neurons whose pre-activation is above zero where the activation is ReLU, else the `keep` largest of
    |act(gate(x)) · up(x)|. The loss is the paper's: binary cross-entropy weighted by y (1 - w) + w with w the share of
    positives + 0.005. Unlike the paper's, the second layer has a bias, which starts at the log-odds of the labels, and
    U starts at zero: training starts from the neurons that are hot for all tokens. The state with the best recall on
    held-out documents is kept.

    Attributes:
        keep: share of the neurons computed, the same for every token.
        rank: rows of D; None: a twelfth of the inputs, as in the paper (1000 for 12,288), at least 32.
        lookahead: look at the input of the MLP before, so that a GPU may choose while attention runs.
        epochs, batch_size, learning_rate, weight_decay: of AdamW, over tokens of the training documents.
        patience: epochs without better recall after which training stops.
        held_out: share of the documents that recall is measured on.
        seed: of the split, of D and of the order of tokens.

    Raises:
        StepError: at construction, for a value out of range.
    """

    keep: float = 0.5
    rank: int | None = None
    lookahead: bool = False
    epochs: int = 20
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    patience: int = 5
    held_out: float = 0.05
    seed: int = 0

    kind: ClassVar[str] = "predictor"

    def __post_init__(self) -> None:
        check_keep(self.kind, self.keep)
        for name in ("epochs", "batch_size", "patience", *(() if self.rank is None else ("rank",))):
            if getattr(self, name) < 1:
                raise StepError(f"predictor.{name} is {getattr(self, name)!r}; give 1 or more")
        if not self.learning_rate > 0:
            raise StepError(f"predictor.learning_rate is {self.learning_rate!r}; give a number above 0")
        if not 0 < self.held_out < 1:
            raise StepError(f"predictor.held_out is {self.held_out!r}; give a share between 0 and 1")

    def fit(
        self, model: nn.Module, mlps: Sequence[Mlp], documents: Sequence[Document]
    ) -> tuple[list[Tensors], dict[str, float]]:
        """Read the documents once, keeping the inputs of all MLPs, then train a predictor for each.

        Returns:
            Tensors by MLP; recall and precision on held-out documents, the mean over MLPs.

        Raises:
            StepError: there are fewer than two documents.
        """
        _, held = split_documents(len(documents), self.held_out, self.seed)
        read: dict[bool, list[list[Tensor]]] = {side: [[] for _ in mlps] for side in (False, True)}

        def see(name: str, document: int, x: Tensor) -> None:
            read[document in held][int(name)].append(x)

        watch(model, documents, {str(i): mlp.first[0] for i, mlp in enumerate(mlps)}, see)
        tokens = {side: [torch.cat(parts).float() for parts in read[side]] for side in read}
        found, quality = [], []
        for i, mlp in enumerate(mlps):
            before = max(0, i - 1) if self.lookahead else i
            sides = [
                (
                    tokens[side][before],
                    torch.cat([self.labels(mlp, x) for x in tokens[side][i].split(4096)]),
                )
                for side in (False, True)
            ]
            tensors, figures = learn(self, kept_of(mlp, self.keep), sides[0], sides[1])
            found.append(tensors)
            quality.append(figures)
        return found, means(quality)

    def rank_for(self, inputs: int) -> int:
        """Rows of D for inputs of this width."""
        return self.rank or max(32, inputs // 12)

    def shapes(self, mlp: Mlp) -> dict[str, tuple[int, ...]]:
        """`first` D, `second` U and `bias` b."""
        rank = self.rank_for(mlp.inputs)
        return {"first": (rank, mlp.inputs), "second": (mlp.hidden, rank), "bias": (mlp.hidden,)}

    def choose(
        self, tensors: Mapping[str, Tensor], mlp: Mlp, x: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `NeuronMethod`."""
        return largest(logits(tensors, seen.float()), kept_of(mlp, self.keep)), None

    def labels(self, mlp: Mlp, x: Tensor) -> Tensor:
        """The neurons that each token of x (N, inputs) needs, (N, hidden) bool."""
        values = mlp.values(x.to(mlp.down.weight.dtype))
        if mlp.activation == "relu" and not mlp.gated:
            return values > 0
        return largest(values.abs(), kept_of(mlp, self.keep))


def learn(
    settings: Predictor, count: int, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]
) -> tuple[Tensors, dict[str, float]]:
    """Train one predictor.

    Args:
        count: how many of the outputs are chosen for a token.
        train, held: what it sees, (N, inputs) float32, and what is needed, (N, outputs) bool.

    Returns:
        `first` (rank, inputs), `second` (outputs, rank) and `bias` (outputs,); recall and precision on `held`.
    """
    (seen, wanted), device = train, train[0].device
    generator = torch.Generator().manual_seed(settings.seed)
    rank = settings.rank_for(seen.shape[1])
    first = torch.randn(rank, seen.shape[1], generator=generator) / math.sqrt(seen.shape[1])
    tensors = {
        "first": first.to(device).requires_grad_(),
        "second": torch.zeros(wanted.shape[1], rank, device=device).requires_grad_(),
        "bias": torch.logit(wanted.float().mean(0).clamp(1e-4, 1 - 1e-4)).requires_grad_(),
    }
    optimizer = torch.optim.AdamW(
        tensors.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    best, stale = {name: value.detach().clone() for name, value in tensors.items()}, 0
    figures = _quality(best, count, held)
    for _ in range(settings.epochs):
        for places in torch.randperm(len(wanted), generator=generator).split(settings.batch_size):
            here = places.to(device)
            labels = wanted[here].float()
            positive = float(labels.mean()) + _BALANCE
            with torch.enable_grad():
                loss = F.binary_cross_entropy_with_logits(
                    logits(tensors, seen[here]), labels, labels * (1 - positive) + positive
                )
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        new = _quality(tensors, count, held)
        stale += 1
        if new["recall"] > figures["recall"]:
            best, figures, stale = {name: t.detach().clone() for name, t in tensors.items()}, new, 0
        if stale >= settings.patience:
            break
    return best, figures


@torch.no_grad()
def _quality(tensors: Mapping[str, Tensor], count: int, held: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Of the outputs needed, how many are chosen; and of those chosen, how many are needed."""
    hits = chosen = 0
    for seen, wanted in zip(held[0].split(1024), held[1].split(1024), strict=True):
        mask = largest(logits(tensors, seen), count)
        hits += int((wanted & mask).sum())
        chosen += int(mask.sum())
    return {"recall": hits / max(1, int(held[1].sum())), "precision": hits / max(1, chosen)}


def logits(tensors: Mapping[str, Tensor], seen: Tensor) -> Tensor:
    """(N, outputs) of what is seen, (N, inputs) float32."""
    return F.linear(F.linear(seen, tensors["first"]), tensors["second"], tensors["bias"])


def means(quality: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over layers of each figure."""
    return {name: math.fsum(own[name] for own in quality) / len(quality) for name in quality[0]}
