"""Tiny random decoders, prompts with left padding, and a dense cache with one mask a head to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.23")

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "phi", "opt")


def build(family: str, kv_heads: int = 2, group: int = 2, layers: int = 3, seed: int = 0) -> Any:
    """A random model in float32 and eval mode; OPT and Phi have as many key-value heads as heads."""
    torch.manual_seed(seed)
    heads = kv_heads * group
    settings = {**COMMON, "num_attention_heads": heads, "hidden_size": 8 * heads, "num_hidden_layers": layers}
    grouped = {**settings, "num_key_value_heads": kv_heads}
    t = transformers
    if family == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**grouped))
    elif family == "qwen2":
        model = t.Qwen2ForCausalLM(t.Qwen2Config(**grouped))
    elif family == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**grouped, head_dim=8))
    elif family == "gemma3":
        types = [["full_attention", "sliding_attention"][index % 2] for index in range(layers)]
        model = t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(
                **grouped, head_dim=8, sliding_window=16, layer_types=types, query_pre_attn_scalar=8
            )
        )
    elif family == "phi":
        model = t.PhiForCausalLM(t.PhiConfig(**{**settings, "num_key_value_heads": heads}))
    else:
        del settings["intermediate_size"]
        model = t.OPTForCausalLM(
            t.OPTConfig(**settings, ffn_dim=48, word_embed_proj_dim=settings["hidden_size"])
        )
    model.generation_config.eos_token_id = None
    # Random weights of the usual size attend to everything alike; larger ones tell heads apart.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)
    return model.eval()


@pytest.fixture
def family() -> Callable[..., Any]:
    return build


def prompts(batch: int = 1, length: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids (B, n) and their mask: each sequence but the first has more padding on its left."""
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 7 * row] = 0
    return ids, mask


@pytest.fixture
def prompt() -> Callable[..., tuple[Tensor, Tensor]]:
    return prompts


@torch.no_grad()
def forced(model: Any, cache: Any, ids: Tensor, mask: Tensor, more: Tensor, after: Any = None) -> Tensor:
    """Logits (B, 1 + T, V) after the prompt and after each of T more tokens (B, T), with positions by the mask."""
    logits = []
    for step in range(more.shape[1] + 1):
        new = ids if step == 0 else more[:, step - 1 : step]
        if step:
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        out = model(
            input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        logits.append(out.logits[:, -1])
        if after is not None:
            after()
    return torch.stack(logits, dim=1)


@pytest.fixture
def teacher_forced() -> Callable[..., Tensor]:
    return forced


class MaskedAttention:
    """Dense attention in which every key-value head has its own mask, step by step: what a ragged cache must equal.

    `kept[step][layer][row][head]` are the positions that are kept after a step, without padding.
    """

    def __init__(self, kept: list[dict[int, list[list[list[int]]]]], mask: Tensor) -> None:
        self._kept, self._mask = kept, mask

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        batch, heads, total, _ = key.shape
        group = query.shape[1] // heads
        prompt = self._mask.shape[1]
        if query.shape[2] > 1 or module.layer_idx not in self._kept[0]:
            visible = attention_mask.expand(batch, query.shape[1], -1, -1)
        else:
            step = total - prompt - 1  # the newest token is not yet in what was kept
            visible = torch.zeros(batch, heads, 1, total, dtype=torch.bool)
            for row in range(batch):
                padding = int((self._mask[row] == 0).sum())
                for head in range(heads):
                    places = self._kept[step][module.layer_idx][row][head]
                    visible[row, head, 0, [place + padding for place in places]] = True
            visible[..., -1] = True
            visible = visible.repeat_interleave(group, dim=1)
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, torch.finfo(query.dtype).min)
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def masked_attention() -> type[MaskedAttention]:
    return MaskedAttention
