"""What stands in for an attention's first and last layer, and for its attention function, while heads are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cveff.errors import MissingDependencyError, StepError
from cveff.kernels.decode_attention import decode_attention
from cveff.kernels.gather_linear import some_inputs, some_outputs
from cveff.sparsity.heads import Attention, HeadPredictor
from cveff.sparsity.layers import Shared, SparseHook, replaced, transposed
from cveff.sparsity.method import largest
from cveff.sparsity.predictor import logits

FUNCTION = "cveff_head_groups"
"""Its name among transformers' attention functions."""


class HeadHook(SparseHook):
    """Chooses groups when the queries are computed, and leaves the others out of what follows."""

    def __init__(
        self, attention: Attention, method: HeadPredictor, tensors: Mapping[str, Tensor], shared: Shared
    ) -> None:
        super().__init__(shared)
        self.attention, self.method, self.tensors = attention, method, tensors
        self.groups: Tensor | None = None
        self._mask: Tensor | None = None
        self._query, self._output = attention.query.forward, attention.output.forward

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hook in both layers' place, and transformers told to call `attend`."""
        with ExitStack() as stack:
            stack.enter_context(_implementation(self.attention.module))
            stack.enter_context(transposed(self.attention.output))
            stack.enter_context(replaced(self.attention.query, self.forward))
            stack.enter_context(replaced(self.attention.output, self.output))
            yield

    def forward(self, x: Tensor) -> Tensor:
        """Queries (..., heads · D) of x (..., inputs), zero where not chosen."""
        self.groups = self._mask = None
        if not (self.shared.everything or self.shared.decoding) or x.numel() == 0:
            return self._query(x)
        flat = x.reshape(-1, x.shape[-1])
        mask = largest(logits(self.tensors, flat.float()), self.method.kept(self.attention))
        union = mask.any(0)
        self._count(mask, float(union.float().mean()))
        if self.shared.everything:
            self._mask = mask.repeat_interleave(self.attention.width, dim=1)
            return self._query(x)
        if bool(union.all()):
            self.dense += 1
            return self._query(x)
        self.groups = union.nonzero()[:, 0]
        columns, query = self._columns(), self.attention.query
        found = flat.new_zeros(len(flat), query.out_features)
        found[:, columns] = some_outputs(flat, query.weight, columns, query.bias)
        return found.reshape(*x.shape[:-1], -1)

    def output(self, x: Tensor) -> Tensor:
        """The attention's output (..., inputs) of the heads' answers (..., heads · D)."""
        if self._mask is not None:
            return self._output(x * self._mask.reshape(x.shape))
        if self.groups is None:
            return self._output(x)
        columns, layer = self._columns(), self.attention.output
        values = x.reshape(-1, x.shape[-1])[:, columns]
        return some_inputs(values, layer.weight.t(), columns, layer.bias).reshape(*x.shape[:-1], -1)

    def _columns(self) -> Tensor:
        assert self.groups is not None
        width = self.attention.width
        return (self.groups[:, None] * width + torch.arange(width, device=self.groups.device)).flatten()


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers' kind: what the module's hook did not choose is not read, and is zero."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer: Any = module.q_proj
    hook: HeadHook = layer.forward.__self__
    groups = hook.groups
    if groups is None or query.shape[2] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    batch, kv_heads, length, head_dim = key.shape
    if attention_mask is None and more.get("softcap") is None and more.get("position_bias") is None:
        offsets = torch.arange(batch * kv_heads + 1, dtype=torch.int32, device=key.device) * length
        lengths = torch.zeros(batch, kv_heads, dtype=torch.int32, device=key.device)
        lengths[:, groups] = length
        keys, values = key.reshape(-1, head_dim), value.reshape(-1, head_dim)
        scale = more.get("scaling") or head_dim**-0.5
        found = decode_attention(query[:, :, 0], keys, values, offsets, lengths.flatten(), scale)
        return found[:, None], None
    per_group = query.shape[1] // kv_heads
    heads = (groups[:, None] * per_group + torch.arange(per_group, device=groups.device)).flatten()
    mask = attention_mask
    if mask is not None and mask.shape[1] != 1:
        mask = mask[:, heads]
    part, _ = sdpa_attention_forward(module, query[:, heads], key[:, groups], value[:, groups], mask, **more)
    found = part.new_zeros(batch, 1, query.shape[1], head_dim)
    found[:, :, heads] = part
    return found, None


@contextmanager
def _implementation(module: nn.Module) -> Iterator[None]:
    """Transformers calls `attend` for this module until the block ends."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise MissingDependencyError(f"{error}; pip install 'cveff[transformers]'") from error
    config: Any = getattr(module, "config", None)
    used = getattr(config, "_attn_implementation", None)
    if used not in ("sdpa", FUNCTION):
        raise StepError(f"the network's attention is {used!r}; load it with attn_implementation='sdpa'")
    AttentionInterface.register(FUNCTION, attend)
    AttentionMaskInterface.register(FUNCTION, sdpa_mask)
    config._attn_implementation = FUNCTION
    try:
        yield
    finally:
        config._attn_implementation = used
