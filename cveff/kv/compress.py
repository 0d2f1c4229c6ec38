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
        from cveff.kv.model_layers import FULL, attentions, implementations, text_config, windows
    except ImportError as error:
        raise MissingDependencyError(
            f"{error}; pip install 'cveff[transformers]' brings transformers"
        ) from error
    check_count("slack", slack)
    rerotates = isinstance(policy, StreamingLLM)
    if rerotates and storage is not None:
        raise CacheError(
            "StreamingLLM re-rotates its first keys, which packed storage cannot; leave storage out"
        )
    layers = windows(text_config(model))
    before = implementations(model)
    rotation = _rotation(model, attentions(model), layers, FULL) if rerotates else None
    notes: tuple[str, ...] = ()
    if marks is None:
        marks = marks_of(model, tokenizer)
        if tokenizer is None and policy.needs_tokens:
            notes = ("no tokenizer was given: no token counts as punctuation",)
    cache = RaggedCache(layers, policy, storage, slack, marks, rotation, notes)
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


def _rotation(model: Any, attentions: list[Any], windows: list[int | None], layer_type: str) -> Rotation:
    full = {index for index, window in enumerate(windows) if window is None}
    attention = next(m for m in attentions if m.layer_idx in full and hasattr(m, "head_dim"))
    return rotation_of(model, attention, layer_type)
