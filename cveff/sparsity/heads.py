"""`HeadPredictor`: only some groups of attention heads answer a token (Deja Vu: Liu et al., arXiv:2310.17157).

Heads that share keys and values are chosen together. Keys and values are always computed and kept, so that a head that
is skipped now misses nothing later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cveff.errors import StepError
from cveff.sparsity.collect import Document, split_documents, watch
from cveff.sparsity.method import Tensors, check_keep, largest
from cveff.sparsity.predictor import Predictor, learn, means

_OUTPUTS = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True)
class Attention:
    """An attention module of a decoder.

    Attributes:
        path: in the network.
        module: it; transformers' attention functions are given it.
        query, output: its first and last layer.
        groups: heads of keys and values.
        width: columns of a group, in the queries and in what `output` reads.
    """

    path: str
    module: nn.Module
    query: nn.Linear
    output: nn.Linear
    groups: int
    width: int


@dataclass(frozen=True)
class HeadPredictor(Predictor):
    """Groups of heads, chosen by a `Predictor` that sees the attention's input.

    A group's label is whether its output, before the output layer, is among the `keep` largest in norm. Settings are
    those of `Predictor`; `keep` is rounded to groups, at least one.
    """

    kind: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        check_keep(self.kind, self.keep)
        super().__post_init__()
        if self.lookahead:
            raise StepError("heads.lookahead is True; only the attention's own input is looked at")

    def attentions(self, model: nn.Module) -> tuple[Attention, ...]:
        """The network's attention modules.

        Raises:
            StepError: there is none with q_proj, k_proj and v_proj, or one has a single group.
        """
        found = tuple(
            attention
            for path, module in model.named_modules()
            if (attention := _attention(path, module)) is not None
        )
        if not found:
            raise StepError(
                f"{type(model).__name__} has no attention with q_proj, k_proj, v_proj and an output layer"
            )
        for attention in found:
            if attention.groups == 1:
                raise StepError(
                    f"{attention.path} has one head of keys and values; there is nothing to choose from"
                )
        return found

    def kept(self, attention: Attention) -> int:
        """Groups that are computed."""
        return max(1, round(self.keep * attention.groups))

    def fit_heads(
        self, attentions: Sequence[Attention], model: nn.Module, documents: Sequence[Document]
    ) -> tuple[list[Tensors], dict[str, float]]:
        """As `Predictor.fit`, for attention modules.

        Raises:
            StepError: there are fewer than two documents.
        """
        _, held = split_documents(len(documents), self.held_out, self.seed)
        read: dict[tuple[str, bool], list[Tensor]] = {}

        def see(name: str, document: int, x: Tensor) -> None:
            read.setdefault((name, document in held), []).append(x.float())

        layers = {f"{i} in": attention.query for i, attention in enumerate(attentions)}
        layers |= {f"{i} out": attention.output for i, attention in enumerate(attentions)}
        watch(model, documents, layers, see)
        found, quality = [], []
        for i, attention in enumerate(attentions):
            sides = []
            for side in (False, True):
                outputs = torch.cat(read[f"{i} out", side]).unflatten(-1, (attention.groups, attention.width))
                sides.append(
                    (torch.cat(read[f"{i} in", side]), largest(outputs.norm(dim=-1), self.kept(attention)))
                )
            tensors, figures = learn(self, self.kept(attention), sides[0], sides[1])
            found.append(tensors)
            quality.append(figures)
        return found, means(quality)

    def head_shapes(self, attention: Attention) -> dict[str, tuple[int, ...]]:
        """What `fit_heads` returns for this module, by name."""
        inputs = attention.query.in_features
        rank = self.rank_for(inputs)
        return {"first": (rank, inputs), "second": (attention.groups, rank), "bias": (attention.groups,)}


def _attention(path: str, module: nn.Module) -> Attention | None:
    layers = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
    last = next((layers[name] for name in _OUTPUTS if name in layers), None)
    head_dim = getattr(module, "head_dim", None)
    if last is None or not isinstance(head_dim, int) or not {"q_proj", "k_proj", "v_proj"} <= layers.keys():
        return None
    groups, heads = layers["k_proj"].out_features // head_dim, layers["q_proj"].out_features // head_dim
    if groups == 0 or heads % groups or layers["q_proj"].out_features != last.in_features:
        return None
    return Attention(path, module, layers["q_proj"], last, groups, last.in_features // groups)
