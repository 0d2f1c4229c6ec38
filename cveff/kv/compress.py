"""`compress`: a model whose cache keeps what a policy says, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from cveff.errors import CacheError, MissingDependencyError
from cveff.kv.checks import check_count
from cveff.kv.kivi import KIVI
from cveff.kv.marks import Marks, marks_of
from cveff.kv.prompt import Policy
from cveff.kv.rotation import Rotation, rotation_of
from cveff.kv.streaming_llm import StreamingLLM

if TYPE_CHECKING:
    from cveff.kv.cache import RaggedCache

_FULL, _SLIDING = "full_attention", "sliding_attention"
_EXACT = ("sdpa", "eager")


@contextmanager
def compress(
    model: Any,
    policy: Policy,
    *,
    tokenizer: Any | None = None,
    marks: Marks | None = None,
    storage: KIVI | None = None,
    slack: int = 64,
) -> Iterator[RaggedCache]:
    """A cache for `model.generate(..., past_key_values=cache)`, or for forward passes.

    The prompt attends to all of itself; then every key-value head of every full-attention layer keeps what the
    policy says. Positions stay those of the text. Sliding layers are left to their windows.

    Args:
        model: a causal language model of transformers, or a vision-language one; its attention has to be "sdpa" or
            "eager". What it is given back with is what it came with.
        policy: `FastGen`, `H2O`, `StreamingLLM`, `SnapKV`, `PyramidKV`, `AdaKV`, `ImagePrefix`, `Random` or `Full`.
        tokenizer: names special tokens and punctuation. Without it there is no punctuation, and special tokens are
            those in the model's configuration; `cache.notes` says so.
        marks: these sets given by hand, in place of a tokenizer.
        storage: pack older tokens.
        slack: free slots a head may have, so that tokens are appended in place. More means more bytes and fewer
            copies; with 0 every byte allocated by the prompt is in use.

    Yields:
        The cache, empty; its figures stay readable after the block.

    Raises:
        CacheError: the model has no full-attention layer, or layers, an attention implementation or a cache that
            cannot be compressed; StreamingLLM with packed storage, or without rotary embeddings.
        MissingDependencyError: transformers is not installed.
    """
    try:
        from cveff.kv.attention import NAME, register
        from cveff.kv.cache import RaggedCache
    except ImportError as error:
        raise MissingDependencyError(f"{error}; pip install 'cveff[kv]' brings transformers") from error
    check_count("slack", slack)
    rerotates = isinstance(policy, StreamingLLM)
    if rerotates and storage is not None:
        raise CacheError(
            "StreamingLLM re-rotates its first keys, which packed storage cannot; leave storage out"
        )
    text = _text_config(model)
    windows = _windows(text)
    before = _implementations(model)
    rotation = _rotation(model, windows) if rerotates else None
    notes = ()
    if marks is None:
        marks = marks_of(model, tokenizer)
        if tokenizer is None and policy.needs_tokens:
            notes = ("no tokenizer was given: no token counts as punctuation",)
    cache = RaggedCache(windows, policy, storage, slack, marks, rotation, notes)
    register()
    hook = model.register_forward_pre_hook(_Watch(cache), with_kwargs=True)
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield cache
    finally:
        cache.is_open = False
        hook.remove()
        for config, name in before:
            config._attn_implementation = name


class _Watch:
    """Shows the cache the token ids of every forward pass."""

    def __init__(self, cache: RaggedCache) -> None:
        self._cache = cache

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._cache.see(args[0] if args else kwargs.get("input_ids"))


def _text_config(model: Any) -> Any:
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


def _windows(config: Any) -> list[int | None]:
    """A sliding window's size, or None for full attention, for each layer."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    types, arguments = get_layer_types_and_kwargs(config)
    strange = sorted({kind for kind in types if kind not in (_FULL, _SLIDING)})
    if strange:
        raise CacheError(f"layers of type {', '.join(strange)} have no cache that can be compressed")
    if _FULL not in types:
        raise CacheError(
            f"all {len(types)} layers attend within a sliding window, which bounds their cache already; "
            "there is nothing to compress"
        )
    return [
        given.get("sliding_window") if kind == _SLIDING else None
        for kind, given in zip(types, arguments, strict=True)
    ]


def _implementations(model: Any) -> list[tuple[Any, str]]:
    """Configurations that the decoder's attention modules read, and the implementation each names."""
    found = {id(m.config): m.config for m in _attentions(model)}
    if not found:
        raise CacheError(f"{type(model).__name__} has no attention modules that take a cache")
    before = []
    for config in found.values():
        if config._attn_implementation not in _EXACT:
            raise CacheError(
                f"the model's attention is {config._attn_implementation!r}; load it with "
                "attn_implementation='sdpa' to compress its cache"
            )
        before.append((config, config._attn_implementation))
    return before


def _attentions(model: Any) -> list[Any]:
    return [m for m in model.modules() if getattr(m, "layer_idx", None) is not None and hasattr(m, "config")]


def _rotation(model: Any, windows: list[int | None]) -> Rotation:
    attention = next(m for m in _attentions(model) if windows[m.layer_idx] is None and hasattr(m, "head_dim"))
    return rotation_of(model, attention, _FULL)
