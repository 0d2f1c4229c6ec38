"""`Predictor`: two small linear layers guess which neurons a token needs (Deja Vu: Liu et al., arXiv:2310.17157)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
            tensors, figures = self._train(
                mlp, *((tokens[side][i], tokens[side][before]) for side in (False, True))
            )
            found.append(tensors)
            quality.append(figures)
        means = {name: math.fsum(figures[name] for figures in quality) / len(quality) for name in quality[0]}
        return found, means

    def shapes(self, mlp: Mlp) -> dict[str, tuple[int, ...]]:
        """`first` D, `second` U and `bias` b."""
        rank = self.rank or max(32, mlp.inputs // 12)
        return {"first": (rank, mlp.inputs), "second": (mlp.hidden, rank), "bias": (mlp.hidden,)}

    def choose(
        self, tensors: Mapping[str, Tensor], mlp: Mlp, x: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `NeuronMethod`."""
        return largest(_logits(tensors, seen.float()), kept_of(mlp, self.keep)), None

    def _train(
        self, mlp: Mlp, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]
    ) -> tuple[Tensors, dict[str, float]]:
        device = train[0].device
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            share = torch.cat([self.labels(mlp, x).float().sum(0)[None] for x in train[0].split(4096)]).sum(0)
            share = (share / len(train[0])).clamp(1e-4, 1 - 1e-4)
        shapes = self.shapes(mlp)
        first = torch.randn(shapes["first"], generator=generator) / math.sqrt(mlp.inputs)
        tensors = {
            "first": first.to(device).requires_grad_(),
            "second": torch.zeros(shapes["second"], device=device).requires_grad_(),
            "bias": torch.logit(share).requires_grad_(),
        }
        optimizer = torch.optim.AdamW(tensors.values(), lr=self.learning_rate, weight_decay=self.weight_decay)
        best, stale = {name: value.detach().clone() for name, value in tensors.items()}, 0
        figures = self._quality(best, mlp, held)
        for _ in range(self.epochs):
            for x, seen in _batches(train, self.batch_size, generator):
                with torch.no_grad():
                    labels = self.labels(mlp, x).float()
                positive = float(labels.mean()) + _BALANCE
                with torch.enable_grad():
                    loss = F.binary_cross_entropy_with_logits(
                        _logits(tensors, seen), labels, labels * (1 - positive) + positive
                    )
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
            new = self._quality(tensors, mlp, held)
            stale += 1
            if new["recall"] > figures["recall"]:
                best, figures, stale = {name: t.detach().clone() for name, t in tensors.items()}, new, 0
            if stale >= self.patience:
                break
        return best, figures

    def labels(self, mlp: Mlp, x: Tensor) -> Tensor:
        """The neurons that each token of x (N, inputs) needs, (N, hidden) bool."""
        values = mlp.values(x.to(mlp.down.weight.dtype))
        if mlp.activation == "relu" and not mlp.gated:
            return values > 0
        return largest(values.abs(), kept_of(mlp, self.keep))

    @torch.no_grad()
    def _quality(
        self, tensors: Mapping[str, Tensor], mlp: Mlp, held: tuple[Tensor, Tensor]
    ) -> dict[str, float]:
        """Of the neurons needed, how many are chosen; and of those chosen, how many are needed."""
        hits = needed = chosen = 0
        for x, seen in zip(held[0].split(1024), held[1].split(1024), strict=True):
            labels, mask = self.labels(mlp, x), self.choose(tensors, mlp, x, seen)[0]
            hits += int((labels & mask).sum())
            needed += int(labels.sum())
            chosen += int(mask.sum())
        return {"recall": hits / max(1, needed), "precision": hits / max(1, chosen)}


def _logits(tensors: Mapping[str, Tensor], seen: Tensor) -> Tensor:
    return F.linear(F.linear(seen, tensors["first"]), tensors["second"], tensors["bias"])


def _batches(
    tokens: tuple[Tensor, Tensor], size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    for places in torch.randperm(len(tokens[0]), generator=generator).split(size):
        here = places.to(tokens[0].device)
        yield tokens[0][here], tokens[1][here]
