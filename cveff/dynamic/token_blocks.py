"""`ReducedBlocks`: a vision transformer's blocks with fewer tokens from one to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from cveff.dynamic.token_state import Tokens, begin
from cveff.dynamic.token_vit import attention_half, mlp_half
from cveff.errors import StepError


class ReducedBlocks(nn.Module):
    """Blocks, with a reducer in some of them; timm's networks call it as if it were one block.

    Everything a block needs is passed on explicitly, so `torch.compile` and the exporters see one straight graph.

    Args:
        layers: the network's blocks.
        reducers: by the block's number.
        prefix: class, distillation and register tokens, which stay.
        restore: return as many tokens as came in, each replaced by what stands for it now.
    """

    def __init__(
        self, layers: Sequence[nn.Module], reducers: Mapping[int, nn.Module], prefix: int, restore: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.reducers = nn.ModuleDict({str(index): reducer for index, reducer in reducers.items()})
        self.prefix, self.restore = prefix, restore

    def counts(self, num_patches: int) -> tuple[int, ...]:
        """Patch tokens each block's MLP sees (DynamicViT's: all of the block), of `num_patches` at the start."""
        found, count = [], num_patches
        for index in range(len(self.layers)):
            if str(index) in self.reducers:
                count = self.reducers[str(index)].remaining(count, num_patches)  # type: ignore[operator]
            found.append(count)
        return tuple(found)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Tokens (B, N, C) through all blocks: fewer of them, or with `restore` as many.

        Args:
            rope: rotary embeddings of the patch tokens, (n, 2·D).

        Raises:
            StepError: a mask is given: it is of tokens that are not all there later.
        """
        if attn_mask is not None or is_causal:
            raise StepError(
                "attention masks and reduced tokens exclude each other: a mask is of the tokens at the start; "
                "call the network without one"
            )
        tokens = begin(x, self.prefix, rope, self.restore)
        first_count = tokens.num_patches
        for index, layer in enumerate(self.layers):
            if str(index) not in self.reducers:
                tokens = _through(layer, tokens)
                continue
            reducer = self.reducers[str(index)]
            if reducer.is_before_block:
                tokens = _through(layer, cast(Tokens, reducer(tokens, first_count)))
            else:
                x, attended = attention_half(layer, tokens.x, tokens.bias(), tokens.rope)
                tokens = reducer(tokens._replace(x=x), attended)
                tokens = tokens._replace(x=mlp_half(layer, tokens.x))
        return tokens.restored() if self.restore else tokens.x


def _through(layer: nn.Module, tokens: Tokens) -> Tokens:
    """A whole block, by timm's own forward; tokens that are masked come out as they went in."""
    arguments = {} if tokens.rope is None else {"rope": tokens.rope}
    bias = tokens.bias()
    if bias is not None:
        arguments["attn_mask"] = bias
    x = layer(tokens.x, **arguments)
    if tokens.mask is not None:
        changes = nn.functional.pad(tokens.mask, (tokens.prefix, 0), value=1.0)[..., None].to(x.dtype)
        x = tokens.x + changes * (x - tokens.x)
    return tokens._replace(x=x)
