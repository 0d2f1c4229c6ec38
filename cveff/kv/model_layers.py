"""What of a transformers model has a cache that can be compressed."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

from cveff.errors import CacheError

FULL = "full_attention"
_SLIDING = "sliding_attention"
_EXACT = ("sdpa", "eager")


def text_config(model: Any) -> Any:
    """The decoder's configuration.

    Raises:
        CacheError: no transformers model, an encoder with a decoder, a static cache or soft-capped attention.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise CacheError(f"{type(model).__name__} is no transformers model; its cache cannot be compressed")
    if config.is_encoder_decoder:
        raise CacheError(f"{type(model).__name__} is an encoder with a decoder; only decoders are compressed")
    wanted = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    if wanted not in (None, "dynamic", "hybrid"):
        raise CacheError(
            f"the model's generation_config asks for a {wanted!r} cache, whose size is fixed; set "
            "model.generation_config.cache_implementation = None"
        )
    text = config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise CacheError(
            f"{type(model).__name__} caps its attention softly, which scaled_dot_product_attention cannot; "
            "its cache is not compressed"
        )
    return text


def windows(config: Any) -> list[int | None]:
    """A sliding window's size, or None for full attention, for each layer.

    Raises:
        CacheError: layers of another type, or none with full attention.
    """
    types, arguments = get_layer_types_and_kwargs(config)
    strange = sorted({kind for kind in types if kind not in (FULL, _SLIDING)})
    if strange:
        raise CacheError(f"layers of type {', '.join(strange)} have no cache that can be compressed")
    if FULL not in types:
        raise CacheError(
            f"all {len(types)} layers attend within a sliding window, which bounds their cache already; "
            "there is nothing to compress"
        )
    return [
        given["sliding_window"] if kind == _SLIDING else None
        for kind, given in zip(types, arguments, strict=True)
    ]


def attentions(model: Any) -> list[Any]:
    """Modules that know their layer: attention, and the blocks around it."""
    return [m for m in model.modules() if getattr(m, "layer_idx", None) is not None and hasattr(m, "config")]


def implementations(model: Any) -> list[tuple[Any, str]]:
    """Configurations that the attention modules read, and the implementation that each names.

    Raises:
        CacheError: an implementation whose answers a compressed cache would not give, such as flash attention.
    """
    configs = {id(m.config): m.config for m in attentions(model)}.values()
    if not configs:
        raise CacheError(f"{type(model).__name__} has no attention modules that take a cache")
    for config in configs:
        if config._attn_implementation not in _EXACT:
            raise CacheError(
                f"the model's attention is {config._attn_implementation!r}; load it with "
                "attn_implementation='sdpa' to compress its cache"
            )
    return [(config, config._attn_implementation) for config in configs]
