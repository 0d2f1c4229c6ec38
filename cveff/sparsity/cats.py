"""`CATS`: neurons whose gate is nearly closed are skipped (Lee et al., arXiv:2404.08763)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cveff.errors import StepError
from cveff.sparsity.collect import Document, watch
from cveff.sparsity.method import Tensors, check_keep
from cveff.sparsity.structure import Mlp

SAMPLES = 2**14
"""Values of each document that a quantile is taken from, spread over all of them."""


@dataclass(frozen=True)
class CATS:
    """Keep a neuron where |act(gate(x))| > t, with t its (1 - keep)-quantile over the documents, one for each MLP.

    The gate is computed whole, so at most two thirds of the MLP can be saved. Without a gate |act(up(x))| decides, and
    only the last layer is saved.
    """

    keep: float = 0.5

    kind: ClassVar[str] = "cats"
    lookahead: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_keep(self.kind, self.keep)

    def fit(
        self, model: nn.Module, mlps: Sequence[Mlp], documents: Sequence[Document]
    ) -> tuple[list[Tensors], dict[str, float]]:
        """Measure the quantiles; raises as `watch`."""
        read: list[list[Tensor]] = [[] for _ in mlps]

        def see(name: str, _: int, x: Tensor) -> None:
            read[int(name)].append(sample(_strength(mlps[int(name)], x)[0]))

        watch(model, documents, {str(i): mlp.first[0] for i, mlp in enumerate(mlps)}, see)
        return [{"threshold": quantile(values, 1 - self.keep)} for values in read], {}

    def shapes(self, mlp: Mlp) -> dict[str, tuple[int, ...]]:
        """`threshold`: below or at it a neuron is skipped."""
        return {"threshold": ()}

    def choose(
        self, tensors: Mapping[str, Tensor], mlp: Mlp, x: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `NeuronMethod`."""
        strength, gates = _strength(mlp, x)
        return strength > tensors["threshold"], gates


def _strength(mlp: Mlp, x: Tensor) -> tuple[Tensor, Tensor | None]:
    if not mlp.gated:
        return mlp.values(x).abs(), None
    gates = mlp.gates(x)
    return gates.abs(), gates


def sample(values: Tensor) -> Tensor:
    """At most `SAMPLES` of the values, at equal distances, as float32."""
    flat = values.reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLES)].float()


def quantile(parts: Sequence[Tensor], share: float) -> Tensor:
    """The value that this share of all values does not exceed; -1, below every magnitude, for a share of 0.

    Raises:
        StepError: there are no values.
    """
    values = torch.cat(list(parts)) if parts else torch.zeros(0)
    if not len(values):
        raise StepError("a layer read nothing in the documents; give documents that reach all layers")
    count = round(share * len(values))
    return values.kthvalue(count).values if count else values.new_tensor(-1.0)
