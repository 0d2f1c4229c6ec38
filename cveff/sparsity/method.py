"""What a way to choose neurons is: settings that are fitted to a network once, then asked for every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from cveff.errors import StepError
from cveff.sparsity.collect import Document
from cveff.sparsity.structure import Mlp

Tensors = dict[str, Tensor]


class NeuronMethod(Protocol):
    """Chooses neurons of an MLP for each token; a frozen dataclass of JSON values.

    Attributes:
        kind: its name in a file.
        lookahead: whether it is shown the input of the MLP before (of the first MLP: its own).
    """

    kind: ClassVar[str]

    @property
    def lookahead(self) -> bool: ...

    def fit(
        self, model: nn.Module, mlps: Sequence[Mlp], documents: Sequence[Document]
    ) -> tuple[list[Tensors], dict[str, float]]:
        """Tensors for each MLP, all float32 and all that `choose` needs; and figures to report.

        Raises:
            StepError: documents are needed and are too few.
        """
        ...

    def shapes(self, mlp: Mlp) -> dict[str, tuple[int, ...]]:
        """What `fit` returns for this MLP, by name."""
        ...

    def choose(
        self, tensors: Mapping[str, Tensor], mlp: Mlp, x: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The neurons of each token.

        Args:
            tensors: what `fit` returned for this MLP.
            x: (N, inputs), the MLP's input.
            seen: (N, inputs) `x`, or with `lookahead` the input of the MLP before.

        Returns:
            (N, hidden) bool, and `mlp.gates(x)` where that was computed on the way.
        """
        ...


def check_keep(kind: str, keep: float) -> None:
    """Raise if this is no share.

    Raises:
        StepError: says which values are.
    """
    if not 0 < keep <= 1:
        raise StepError(f"{kind}.keep is {keep!r}; give a share of the neurons above 0, up to 1")


def kept_of(mlp: Mlp, keep: float) -> int:
    """How many neurons that share is, at least one."""
    return max(1, round(keep * mlp.hidden))


def largest(scores: Tensor, count: int) -> Tensor:
    """(N, hidden) bool with the `count` largest of each row of scores."""
    places = scores.topk(count, dim=-1).indices
    return scores.new_zeros(scores.shape, dtype=torch.bool).scatter_(-1, places, True)
