"""`RaggedCache`: what a transformers model fills, ragged full-attention layers beside its own sliding ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from cveff.errors import CacheError
from cveff.kv.kivi import KIVI
from cveff.kv.layer import RaggedLayer
from cveff.kv.marks import Marks
from cveff.kv.prompt import Policy
from cveff.kv.rotation import Rotation


class RaggedCache(Cache):
    """Keys and values of a model under a policy; made by `compress`.

    Args:
        layers: "full" or a sliding window's size, for each layer of the model.
        policy: what the full ones keep.
        storage: how they pack older tokens, or None.
        slack: free slots that heads of one group may have each.
        marks: token ids of the sets that policies know.
        rotation: for policies that re-rotate.

    Attributes:
        notes: what a reader of figures should know, such as sets that are empty.
    """

    def __init__(
        self,
        layers: list[int | None],
        policy: Policy,
        storage: KIVI | None,
        slack: int,
        marks: Marks,
        rotation: Rotation | None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.policy, self.storage, self.slack, self.marks, self.notes = policy, storage, slack, marks, notes
        self.is_open = True
        self._tags: Tensor | None = None
        count = layers.count(None)
        made: list[CacheLayerMixin] = []
        for index, window in enumerate(layers):
            full_before = layers[:index].count(None)
            made.append(
                RaggedLayer(self, full_before, count, rotation)
                if window is None
                else DynamicSlidingWindowLayer(sliding_window=window)
            )
        super().__init__(layers=made)

    @property
    def compressed(self) -> Mapping[int, RaggedLayer]:
        """The full-attention layers by their index in the model."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, RaggedLayer)}

    @property
    def nbytes(self) -> int:
        """Bytes allocated, sliding layers included: the sum of the tensors' storages."""
        ragged = sum(layer.kv.nbytes for layer in self.compressed.values() if layer.kv is not None)
        return ragged + sum(tensor.untyped_storage().nbytes() for tensor in self._sliding())

    @property
    def live_nbytes(self) -> int:
        """Bytes in use: (D + E) · itemsize + 4 for every token kept, 4 more where it has a score; no free slots."""
        ragged = sum(layer.kv.live_nbytes for layer in self.compressed.values() if layer.kv is not None)
        return ragged + self.sliding_nbytes

    @property
    def full_nbytes(self) -> int:
        """Bytes in use if nothing were evicted or packed; padding is not counted."""
        return self.sliding_nbytes + sum(layer.full_nbytes for layer in self.compressed.values())

    @property
    def sliding_nbytes(self) -> int:
        """Bytes in use of the sliding layers, which are left to their windows."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._sliding())

    def kept(self) -> dict[int, list[list[int]]]:
        """Tokens kept, by the layer's index in the model: [B][H]."""
        return {index: layer.kv.kept() for index, layer in self.compressed.items() if layer.kv is not None}

    def labels(self) -> dict[int, list[tuple[str, ...]]]:
        """What the policy called each head's choice, by the layer's index in the model: [B][H]."""
        return {index: list(layer.labels) for index, layer in self.compressed.items()}

    def contents(self, layer: int, row: int = 0, head: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (n, D), values (n, E) and original positions (n,) that a key-value head keeps, by position.

        Raises:
            CacheError: the layer is a sliding one or has seen nothing.
        """
        found = self.compressed.get(layer)
        if found is None or found.kv is None:
            raise CacheError(
                f"layer {layer} holds no compressed tokens; compressed are {sorted(self.compressed)}"
            )
        return found.kv.contents(row, head)

    def see(self, input_ids: Tensor | None) -> None:
        """Note the tokens (B, T) of the forward pass that begins."""
        self._tags = None if input_ids is None else self.marks.tags(input_ids)

    def tags_of(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Tags (B, T) of the forward pass under way.

        Raises:
            CacheError: the policy needs them and the model was not called with token ids.
        """
        if self._tags is not None and self._tags.shape == (batch, length):
            return self._tags.to(device)
        if self.policy.needs_tokens:
            raise CacheError(
                f"{type(self.policy).__name__} looks at token ids, and the model was called without; give input_ids"
            )
        return torch.zeros(batch, length, dtype=torch.uint8, device=device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.policy!r}, {len(self.compressed)} of {len(self.layers)} layers)"

    def _sliding(self) -> list[Tensor]:
        layers: list[Any] = [layer for layer in self.layers if not isinstance(layer, RaggedLayer)]
        return [tensor for layer in layers if layer.keys is not None for tensor in (layer.keys, layer.values)]
