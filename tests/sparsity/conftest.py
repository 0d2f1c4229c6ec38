"""Tiny decoders of the families users have, with random weights and real shapes: grouped queries, gates, biases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = SMALL | {"intermediate_size": 72, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], object]] = {
    "llama": lambda: transformers.LlamaConfig(**GATED, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**GATED),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=16),
    "phi": lambda: transformers.PhiConfig(**GATED),
    "phi3": lambda: transformers.Phi3Config(**GATED),
    "opt": lambda: transformers.OPTConfig(**SMALL, ffn_dim=72, word_embed_proj_dim=32),
}


def _decoder(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> nn.Module:
    """A small network of the family, the same each time."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.15)
    return network.to(dtype)


def _text(batch: int = 1, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Token ids without special ones, (batch, length)."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def _documents(count: int = 6) -> list[torch.Tensor]:
    """Token ids of several texts."""
    return [_text(length=20, seed=seed) for seed in range(count)]


@pytest.fixture(scope="session")
def decoder() -> Callable[..., nn.Module]:
    """Builds a small network of a family."""
    return _decoder


@pytest.fixture(scope="session")
def text() -> Callable[..., torch.Tensor]:
    """Draws token ids."""
    return _text


@pytest.fixture(scope="session")
def documents() -> Callable[..., list[torch.Tensor]]:
    """Draws token ids of several texts."""
    return _documents


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    """Each family's name."""
    return str(request.param)
