"""The attention function that transformers models call while a cache is compressed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cveff.errors import CacheError

NAME = "cveff_ragged"


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention through the layer that `key` carries; scaled_dot_product_attention where it carries none.

    Args:
        module: the attention module.
        query: (B, H · g, T, D). key: (B, H, T, D). value: (B, H, T, E).
        attention_mask: (B or 1, 1, T, m) bool, or None.
        scaling: factor of the products; D ** -0.5 by default.

    Raises:
        CacheError: the model asks for what a ragged cache does not compute, such as a soft cap or learned sinks.
    """
    layer = getattr(key, "ragged_layer", None)
    if layer is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise CacheError(
                f"{type(module).__name__} gives attention a {name!r}, which a compressed cache ignores"
            )
    if kwargs.get("dropout"):
        raise CacheError("attention has dropout; a compressed cache is for inference: model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(module, query, key, value, attention_mask, scale), None


def register() -> None:
    """Make the function known to transformers under `NAME`; doing so again changes nothing."""
    AttentionInterface.register(NAME, ragged_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
