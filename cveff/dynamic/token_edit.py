"""The edit that reduces tokens between a vision transformer's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from torch import nn

from cveff.dynamic.dynamicvit import KeepPredicted
from cveff.dynamic.dynamicvit_loss import RatioObjective
from cveff.dynamic.evit import KeepAttended
from cveff.dynamic.token_blocks import ReducedBlocks
from cveff.dynamic.token_vit import require_block, require_vit
from cveff.dynamic.tome import MergeTokens
from cveff.errors import StepError
from cveff.train.objective import Objective

Method = Literal["tome", "evit", "dynamicvit"]


@dataclass(frozen=True)
class TokenReduction:
    """Reduce tokens in the blocks `at`. Blocks get new names: `blocks.3` becomes `blocks.0.layers.3`.

    Attributes:
        method: "tome", "evit" or "dynamicvit".
        at: numbers of blocks, from 0, ascending.
        r: of ToMe, tokens merged in each of them.
        keep_rate: of the others, the share that stays each time.
        fuse: of EViT.
        proportional: of ToMe.
        ratio_weight: of DynamicViT, in every later training.
        restore: the last block gives as many tokens as the first was given.

    Raises:
        StepError: when applied: the network is no vision transformer these work on, has reduced tokens already, or
            lacks such a block.
    """

    method: Method
    at: tuple[int, ...]
    r: tuple[int, ...] = ()
    keep_rate: float = 1.0
    fuse: bool = True
    proportional: bool = True
    restore: bool = False
    ratio_weight: float = 2.0
    kind: ClassVar[str] = "reduce_tokens"

    def apply(self, module: nn.Module) -> nn.Module:
        """Change `module` in place and return it; with no block in `at` it stays as it is."""
        network = require_vit(module)
        layers = list(cast(nn.Sequential, network.blocks))
        if reduced_blocks(module) is not None:
            raise StepError("tokens of this network are reduced already; start from the dense one")
        for index in self.at:
            if not 0 <= index < len(layers):
                raise StepError(
                    f"reduce_tokens.at: there is no block {index}; the network has 0 to {len(layers) - 1}"
                )
            require_block(layers[index], index)
        if not self.at:
            return module
        like = next(network.parameters())
        reducers = {index: self._reducer(number, network) for number, index in enumerate(self.at)}
        blocks = ReducedBlocks(layers, reducers, cast(int, network.num_prefix_tokens), self.restore)
        blocks.reducers.to(like.device, like.dtype)
        network.blocks = nn.Sequential(blocks.train(module.training))
        return module

    def constrained(self, objective: Objective, module: nn.Module) -> Objective:
        """`objective`, by which DynamicViT's predictors also learn to keep as many tokens as they should."""
        if self.method != "dynamicvit":
            return objective
        return RatioObjective(objective, self.ratio_weight)

    def _reducer(self, number: int, network: nn.Module) -> nn.Module:
        if self.method == "tome":
            return MergeTokens(self.r[number], self.proportional)
        if self.method == "evit":
            return KeepAttended(self.keep_rate, self.fuse, network.cls_token is not None)
        return KeepPredicted(cast(int, network.embed_dim), self.keep_rate ** (number + 1))


def reduced_blocks(module: nn.Module) -> ReducedBlocks | None:
    """The blocks of a network in which tokens are reduced, or None."""
    return next((part for part in module.modules() if isinstance(part, ReducedBlocks)), None)
