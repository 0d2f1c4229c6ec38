"""What every chooser of neurons is compared with: the best choice, always the same neurons, and any neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cveff.sparsity.collect import Document, watch
from cveff.sparsity.method import Tensors, check_keep, kept_of, largest
from cveff.sparsity.structure import Mlp


@dataclass(frozen=True)
class Oracle:
    """The largest values |act(gate(x)) · up(x)| of each token. It computes the whole MLP first: for studies only."""

    keep: float = 0.5

    kind: ClassVar[str] = "oracle"
    lookahead: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_keep(self.kind, self.keep)

    def fit(
        self, model: nn.Module, mlps: Sequence[Mlp], documents: Sequence[Document]
    ) -> tuple[list[Tensors], dict[str, float]]:
        """Nothing to fit."""
        return [{} for _ in mlps], {}

    def shapes(self, mlp: Mlp) -> dict[str, tuple[int, ...]]:
        """No tensors."""
        return {}

    def choose(
        self, tensors: Mapping[str, Tensor], mlp: Mlp, x: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `NeuronMethod`."""
        return largest(mlp.values(x).abs(), kept_of(mlp, self.keep)), None


class _SameForAll:
    """Neurons that were chosen once, whatever the token."""

    def shapes(self, mlp: Mlp) -> dict[str, tuple[int, ...]]:
        """`chosen`: 1 for a neuron that is kept."""
        return {"chosen": (mlp.hidden,)}

    def choose(
        self, tensors: Mapping[str, Tensor], mlp: Mlp, x: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `NeuronMethod`."""
        return tensors["chosen"].bool().expand(len(x), -1), None


@dataclass(frozen=True)
class HotNeurons(_SameForAll):
    """The neurons that are most often among a token's largest on the documents: the same for every token."""

    keep: float = 0.5

    kind: ClassVar[str] = "hot"
    lookahead: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_keep(self.kind, self.keep)

    def fit(
        self, model: nn.Module, mlps: Sequence[Mlp], documents: Sequence[Document]
    ) -> tuple[list[Tensors], dict[str, float]]:
        """Count on all documents; raises as `watch`."""
        counts = [torch.zeros(mlp.hidden, device=mlp.down.weight.device) for mlp in mlps]

        def see(name: str, _: int, x: Tensor) -> None:
            mlp = mlps[int(name)]
            counts[int(name)] += largest(mlp.values(x).abs(), kept_of(mlp, self.keep)).sum(0)

        watch(model, documents, {str(i): mlp.first[0] for i, mlp in enumerate(mlps)}, see)
        chosen = [largest(count, kept_of(mlp, self.keep)) for mlp, count in zip(mlps, counts, strict=True)]
        return [{"chosen": mask.float()} for mask in chosen], {}


@dataclass(frozen=True)
class RandomNeurons(_SameForAll):
    """Neurons drawn once for each MLP: what choosing is worth nothing without."""

    keep: float = 0.5
    seed: int = 0

    kind: ClassVar[str] = "random"
    lookahead: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_keep(self.kind, self.keep)

    def fit(
        self, model: nn.Module, mlps: Sequence[Mlp], documents: Sequence[Document]
    ) -> tuple[list[Tensors], dict[str, float]]:
        """Draw; documents are not read."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = [torch.rand(mlp.hidden, generator=generator) for mlp in mlps]
        return [
            {"chosen": largest(score, kept_of(mlp, self.keep)).float()}
            for mlp, score in zip(mlps, scores, strict=True)
        ], {}
