"""`RaggedLayer`: a full-attention layer of a transformers cache, with a length of its own for every head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cveff.errors import CacheError
from cveff.kv.prefill import prompts
from cveff.kv.ragged import RaggedKV, first_segments
from cveff.kv.rotation import Rotation
from cveff.kv.step import Step

if TYPE_CHECKING:
    from cveff.kv.cache import RaggedCache


class RaggedLayer(CacheLayerMixin):
    """The first forward pass is the prompt: it attends to all of itself, then the policy chooses what stays.

    Args:
        cache: the cache it belongs to.
        index: among the layers that are compressed.
        num_layers: how many these are.
        rotation: for policies that re-rotate.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: RaggedCache, index: int, num_layers: int, rotation: Rotation | None) -> None:
        super().__init__()
        self._cache, self._index, self._num_layers, self._rotation = cache, index, num_layers, rotation
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.kv: RaggedKV | None = None
        self.labels: list[tuple[str, ...]] = []
        self.is_initialized = False
        self._logical = 0
        self._is_pending = False
        self._expected: tuple[torch.dtype, torch.device, int, int] | None = None
        self._token_nbytes = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated before the prompt is known."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys (B, H, T, D) and values (B, H, T, E) on to the attention function, which stores them.

        Raises:
            CacheError: outside the `with` block, or where dtype, device or batch differ from the prompt's.
        """
        self._check(key_states, value_states)
        # The attention function is given these tensors and nothing else of the cache, so one of them carries the
        # layer there: no global table, and two caches in one process cannot meet.
        carrier = key_states.view_as(key_states)
        carrier.ragged_layer = self  # type: ignore[attr-defined]
        self._is_pending = True
        return carrier, value_states

    def attend(
        self,
        module: nn.Module,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Attend, and store the new tokens.

        Args:
            module: the attention module.
            queries: (B, H · g, T, D). keys: (B, H, T, D). values: (B, H, T, E).
            mask: (B or 1, 1, T, m) bool, whose last T columns are the new tokens; None for causal.
            scale: factor of the products.

        Returns:
            (B, T, H · g, E).
        """
        self._is_pending = False
        batch, num_queries, length, _ = queries.shape
        if mask is not None and mask.dtype != torch.bool:
            raise CacheError(f"the attention mask is {mask.dtype}; give one of (B, n), or a bool one")
        sees = None if mask is None else mask[:, 0, :, -length:].expand(batch, -1, -1)
        tags = self._cache.tags_of(batch, length, queries.device)
        self._logical += length
        if self.kv is None:
            out, _ = sdpa_attention_forward(module, queries, keys, values, mask, scaling=scale)
            self.kv = self._compressed(queries, keys, values, sees, tags, scale)
            return out
        step = self._step(self.kv, keys, values, sees, tags)
        grouped = queries.reshape(batch * keys.shape[1], -1, length, queries.shape[-1])
        out = self.kv.attend(grouped, step, scale)
        return out.view(batch, num_queries, length, -1).transpose(1, 2).contiguous()

    @property
    def full_nbytes(self) -> int:
        """Bytes that keys and values of all tokens seen would take, padding left out."""
        return 0 if self.kv is None else self._token_nbytes * sum(self.kv.seen)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: the model counts positions and masks from it."""
        return self._logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask: as many keys as the longest head keeps, then the new tokens."""
        longest = 0 if self.kv is None else max(max(row) for row in self.kv.kept())
        return longest + query_length, self._logical - longest

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        """Raise: not supported."""
        raise CacheError(
            "beam search moves sequences within the cache, which a ragged one cannot; use num_beams=1"
        )

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Raise: evicted tokens do not come back."""
        raise CacheError(
            "a compressed cache cannot be rolled back, as evicted tokens are gone; generate without an assistant"
        )

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Raise: not supported."""
        raise CacheError("sequences of a compressed cache cannot be repeated; repeat the prompts instead")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        """Raise: not supported."""
        raise CacheError(
            "sequences of a compressed cache cannot be picked out; give them caches of their own"
        )

    def offload(self) -> NoReturn:
        """Raise: not supported."""
        raise CacheError("a compressed cache is not offloaded; use one or the other")

    def _compressed(
        self, queries: Tensor, keys: Tensor, values: Tensor, sees: Tensor | None, tags: Tensor, scale: float
    ) -> RaggedKV:
        segments, seen = [], []
        for prompt in prompts(queries, keys, values, sees, tags, scale, self._index, self._num_layers):
            chosen = self._cache.policy.select(prompt)
            segments += first_segments(
                prompt.keys,
                prompt.values,
                chosen.keep,
                prompt.codes(chosen.pinned),
                chosen.scores,
                chosen.rules,
                prompt.row,
            )
            seen.append(prompt.num_tokens)
            self.labels.append(chosen.labels)
        self.is_initialized = True
        self._token_nbytes = keys.shape[1] * (keys.shape[3] + values.shape[3]) * keys.element_size()
        cache = self._cache
        return RaggedKV(segments, keys.shape[1], seen, cache.slack, cache.storage, self._rotation)

    def _step(self, kv: RaggedKV, keys: Tensor, values: Tensor, sees: Tensor | None, tags: Tensor) -> Step:
        before = torch.tensor(kv.seen, device=keys.device, dtype=torch.int32)[:, None]
        # A single new token is never padding: generation appends one to every sequence, also to finished ones.
        if keys.shape[2] == 1 or sees is None:
            places = before + torch.arange(keys.shape[2], device=keys.device, dtype=torch.int32)
            return Step(keys.flatten(0, 1), values.flatten(0, 1), places, tags)
        valid = sees.diagonal(dim1=1, dim2=2)
        places = before + valid.cumsum(1, dtype=torch.int32) - 1
        return Step(keys.flatten(0, 1), values.flatten(0, 1), places, tags, valid, sees)

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if not self._cache.is_open:
            raise CacheError(
                "the cache is used outside its `with cveff.kv.compress(…)` block; generate inside it"
            )
        if self._is_pending:
            raise CacheError(
                "the model's attention did not go through the cache; was its implementation changed?"
            )
        if torch.is_grad_enabled() and keys.requires_grad:
            raise CacheError("a compressed cache is for inference; generate under torch.no_grad()")
        if keys.dtype != values.dtype:
            raise CacheError(f"keys are {keys.dtype} and values {values.dtype}; they have to be of one dtype")
        found = (keys.dtype, keys.device, keys.shape[0], keys.shape[1])
        if self._expected is not None and found != self._expected:
            raise CacheError(
                "the cache holds (dtype, device, sequences, heads) "
                f"{self._expected} and is given {found}; use a new cache, or cache.reset()"
            )
        self._expected = found
        if self._cache.storage is not None:
            for width in (keys.shape[-1], values.shape[-1]):
                self._cache.storage.check(width)
