"""`TEAL`: linear layers skip inputs that are nearly zero (Liu et al., arXiv:2408.14690)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from cveff.errors import StepError
from cveff.sparsity.cats import quantile, sample
from cveff.sparsity.collect import Document, watch
from cveff.sparsity.method import Tensors, check_keep
from cveff.sparsity.structure import find_mlps

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "dense")


@dataclass(frozen=True)
class TEAL:
    """Inputs with |x| <= t count as zero, with t the (1 - keep)-quantile over the documents, one for each layer.

    Covers the linear layers of MLPs, and of attention with `attention`. The same share everywhere: the paper's greedy
    search of a share for each layer is not built.

    Attributes:
        keep: share of the inputs that are read.
        attention: also the layers called q_proj, k_proj, v_proj, o_proj, out_proj, qkv_proj and dense beside MLPs.
    """

    keep: float = 0.5
    attention: bool = True

    kind: ClassVar[str] = "teal"

    def __post_init__(self) -> None:
        check_keep(self.kind, self.keep)

    def layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers it makes sparse, by path.

        Raises:
            StepError: the network has no MLP.
        """
        wanted = {id(layer) for mlp in find_mlps(model) for layer in (*mlp.first, mlp.down)}
        return {
            path: module
            for path, module in model.named_modules()
            if type(module) is nn.Linear
            and (id(module) in wanted or (self.attention and path.rpartition(".")[2] in _ATTENTION))
        }

    def fit(self, model: nn.Module, documents: Sequence[Document]) -> list[Tensors]:
        """`threshold` of each layer.

        Raises:
            StepError: there are no documents, or one of the layers reads nothing.
        """
        layers = self.layers(model)
        read: dict[str, list[Tensor]] = {path: [] for path in layers}
        watch(model, documents, layers, lambda path, _, x: read[path].append(sample(x.abs())))
        silent = [path for path, parts in read.items() if not parts]
        if silent:
            raise StepError(
                f"{silent[0]} reads nothing in the documents; give documents that reach all layers"
            )
        return [{"threshold": quantile(parts, 1 - self.keep)} for parts in read.values()]
