"""MLPs are found by structure in every family, and what only looks like one is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from cveff.errors import StepError
from cveff.sparsity import find_mlps


@pytest.mark.parametrize(
    ("family", "gated", "whole", "activation"),
    [
        ("llama", True, True, "silu"),
        ("qwen2", True, True, "silu"),
        ("gemma3", True, True, "gelu_tanh"),
        ("phi", False, True, "gelu_tanh"),
        ("phi3", True, True, "silu"),
        ("opt", False, False, "relu"),
    ],
)
def test_mlps_of_every_family(decoder, family: str, gated: bool, whole: bool, activation: str) -> None:
    network = decoder(family)
    first, second = find_mlps(network)
    assert (first.gated, first.whole, first.activation) == (gated, whole, activation)
    assert (first.inputs, first.hidden) == (32, 72) and first.path != second.path
    x = torch.randn(3, 32)
    expected = F.linear(first.values(x), first.down.weight, first.down.bias)
    if whole:
        torch.testing.assert_close(first.owner(x[None])[0], expected, rtol=1e-5, atol=1e-5)


def test_mlps_of_a_vision_transformer() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    assert [(mlp.path, mlp.activation) for mlp in find_mlps(network)] == [
        ("blocks.0.mlp", "gelu"),
        ("blocks.1.mlp", "gelu"),
    ]


class Odd(nn.Module):
    """An MLP by its names, that doubles its output."""

    def __init__(self, activation: nn.Module | None, factor: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.factor = nn.Linear(4, 8), nn.Linear(8, 4), factor
        if activation is not None:
            self.act = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.fc2(self.act(self.fc1(x)))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Sequential(nn.Linear(3, 3)), "Sequential has no MLP"),
        (nn.Sequential(Odd(nn.ReLU(), 2.0)), "does not compute"),
        (nn.Sequential(Odd(nn.Softplus(), 1.0)), "0's activation Softplus.* is none of silu"),
        (nn.Sequential(Odd(None, 1.0)), "0 has no activation called act_fn"),
    ],
)
def test_what_is_no_such_mlp_is_refused(network: nn.Module, words: str) -> None:
    with pytest.raises(StepError, match=words):
        find_mlps(network)
