"""Which layers may be replaced: found by running the network, not by looking at its classes."""

from __future__ import annotations

import torch
from torch import nn

import cveff
from cveff.compress.low_rank_layers import find_layers


class Reader(nn.Module):
    """A network that treats its layers in every way that forbids a replacement, and one as it should."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.weight_read, self.bias_read = (nn.Linear(16, 16) for _ in range(3))
        self.twice, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied_a, self.tied_b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied_b.weight = self.tied_a.weight
        self.size_read = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plain(x.flatten(1))
        x = nn.functional.linear(x, self.weight_read.weight)
        x = self.bias_read(x) - self.bias_read.bias
        x = self.twice(self.twice(x))
        return self.tied_a(self.tied_b(self.size_read(x))) / self.size_read.in_features


def test_layers_the_network_reads_are_found_by_running_it() -> None:
    module = Reader().eval()
    names = list(module.state_dict())
    layers, reasons = find_layers(module, torch.randn(1, 1, 4, 4))
    assert list(layers) == ["plain"] and layers["plain"] == (1, 16)
    assert list(module.state_dict()) == names
    assert "never called" in reasons["weight_read"] and "never called" in reasons["unused"]
    assert "is read by the network" in reasons["bias_read"] and "is read" in reasons["size_read"]
    assert reasons["bias_read"].endswith("AttributeError: 'Sequential' object has no attribute 'bias'")
    assert reasons["twice"] == "is called 2 times"
    assert reasons["tied_a"] == "shares its weight with tied_b"


def test_attention_that_reads_its_projection_is_left_alone() -> None:
    module = cveff.create(
        "beit_base_patch16_224", image_size=32, depth=1, embed_dim=64, num_heads=2
    ).module.eval()
    layers, reasons = find_layers(module, torch.randn(1, 3, 32, 32))
    assert "blocks.0.attn.qkv" in reasons and "blocks.0.attn.proj" in layers
