"""Attention by hand: heads, or dimensions of heads, live and die together, and the oracle agrees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.compress.analysis import analyze, check
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
WIDTH, HEADS, DIM = 24, 4, 6


class Net(nn.Module):
    """Patches of 4 x 4, one attention layer, a classifier."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.attn, self.fc = nn.Conv2d(3, WIDTH, 4, 4), attention, nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.fc((tokens + self.attn(tokens)).mean(1))


class Packed(nn.Module):
    """timm's: one linear layer for queries, keys and values; the width of the input written into the last reshape."""

    def __init__(self, fused: bool = True, norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.scale, self.fused = HEADS, DIM**-0.5, fused
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.q_norm = nn.LayerNorm(DIM) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(DIM) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Separate(nn.Module):
    """Three linear layers, and a bias for every pair of tokens and head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, DIM
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(9, HEADS))
        self.register_buffer("index", torch.randint(9, (4, 4)), persistent=False)
        self.proj = nn.Linear(HEADS * DIM, WIDTH)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        bias = self.bias[self.index.flatten()].view(4, 4, -1).permute(2, 0, 1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return self.proj(x.transpose(1, 2).flatten(2))


class Shared(nn.Module):
    """One head of keys and values for all queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(WIDTH, 2 * DIM)
        self.proj = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, HEADS, DIM).transpose(1, 2)
        k, v = self.kv(x)[:, None].chunk(2, -1)
        x = (q @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, HEADS * DIM))


class CrossCovariance(nn.Module):
    """XCiT's: channels attend to channels of their head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
            .permute(2, 0, 3, 4, 1)
            .unbind(0)
        )
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.proj((scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(batch, tokens, width))


class Talking(nn.Module):
    """LeViT's and CaiT's relatives: a linear layer mixes the scores of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.mix = nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.mix((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(batch, tokens, -1))


CASES = {
    "packed": (Packed, "heads", {"embed": 24, "attn.qkv": 4}),
    "packed, by hand": (lambda: Packed(fused=False), "heads", {"embed": 24, "attn.qkv": 4}),
    "packed, normed": (lambda: Packed(norm=True), "heads", {"embed": 24, "attn.qkv": 4}),
    "packed, dimensions": (Packed, "head_dims", {"embed": 24, "attn.qkv": 6}),
    "packed, by hand, dimensions": (lambda: Packed(fused=False), "head_dims", {"embed": 24, "attn.qkv": 6}),
    "packed, normed, dimensions": (lambda: Packed(norm=True), "head_dims", {"embed": 24, "attn.qkv": 6}),
    "separate, with a bias": (Separate, "heads", {"embed": 24, "attn.q": 4}),
    "separate, dimensions": (Separate, "head_dims", {"embed": 24, "attn.q": 6, "attn.v": 6}),
    "keys and values for all": (Shared, "heads", {"embed": 24, "attn.q": 4}),
    "cross-covariance": (CrossCovariance, "heads", {"embed": 24, "attn.qkv": 4}),
    "heads that talk": (Talking, "heads", {"embed": 24}),
}


@pytest.mark.parametrize("name", CASES)
def test_units_of_attention_are_found_and_proven(name: str) -> None:
    torch.manual_seed(0)
    attention, units, expected = CASES[name]
    net = Net(attention()).eval()
    analysis = analyze(net, SPEC, attention=units)
    found = {group.name: group.size for group in analysis.groups}
    for group, size in expected.items():
        assert found.get(group) == size, (found, {group.name: group.reason for group in analysis.frozen})
    random = np.random.default_rng(1)
    keep = {group.name: random.permutation(group.size) < group.size // 2 for group in analysis.groups}
    assert check(net, analysis, keep, torch.randn(2, 3, 8, 8)) < 1e-5
    for group in analysis.groups:  # and each alone, since sizes that agree by chance hide what is held where
        assert check(net, analysis, {group.name: keep[group.name]}, torch.randn(1, 3, 8, 8)) < 1e-5


def test_narrower_heads_keep_the_scale_they_were_trained_with() -> None:
    net = Net(Packed()).eval()
    analysis = analyze(net, SPEC, attention="head_dims")
    edit = analysis.edit({"attn.qkv": np.arange(6) < 4}, net)
    scales = [values["scale"] for values in edit.flexible["attn"].values() if "scale" in values]
    assert scales == [DIM**-0.5]


@pytest.mark.parametrize("units", ["heads", "head_dims"])
def test_attention_written_out_computes_what_the_fused_one_does(units: str) -> None:
    """Exporters do it, and a call fewer must not shift the corrections of others."""
    torch.manual_seed(0)
    net = Net(Packed()).eval()
    analysis = analyze(net, SPEC, attention=units)
    random = np.random.default_rng(2)
    keep = {group.name: random.permutation(group.size) < group.size // 2 - 1 for group in analysis.groups}
    small = analysis.edit(keep, net).apply(net)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        fused = small(images)
        small.attn.fused = False
        assert torch.allclose(small(images), fused, atol=1e-5)
