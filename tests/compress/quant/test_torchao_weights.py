"""torchao's tensors hold our integers and compute what our layers do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cveff.compress.quant.torchao_weights import to_torchao
from cveff.compress.quant.weight_only import WeightOnly, quantize_weights
from cveff.errors import StepError

ao = pytest.importorskip("torchao")


def network(bits: int, symmetric: bool, inputs: int = 128) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(inputs, 128), nn.GELU(), nn.Linear(128, 160, bias=False), nn.Linear(160, 3)
    ).eval()
    quantize_weights(module, WeightOnly(bits, 32, symmetric, weights="nearest", min_weights=1))
    return module


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_plain_tensors_give_equal_answers(bits: int, symmetric: bool) -> None:
    module = network(bits, symmetric)
    changed = to_torchao(module)
    assert "Intx" in type(changed[0].weight.data).__name__ or "Intx" in type(changed[0].weight).__name__
    torch.testing.assert_close(changed[0].weight.dequantize(), module[0].weight)
    x = torch.randn(2, 5, 128)
    torch.testing.assert_close(changed(x), module(x))


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_int4_kernel_gives_the_same_to_float_accuracy(symmetric: bool) -> None:
    module = network(4, symmetric)
    changed = to_torchao(module, "int4-cpu")
    x = torch.randn(2, 5, 128)
    expected = module(x).detach()
    assert float((changed(x).detach() - expected).abs().max() / expected.abs().max()) < 1e-5


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(StepError, match=r"'0' has 100 inputs, no multiple of its groups of 32"):
        to_torchao(network(4, False, inputs=100))
    with pytest.raises(StepError, match="has 8 bits, int4-cpu takes 4"):
        to_torchao(network(8, False), "int4-cpu")
    with pytest.raises(StepError, match="no packed layer"):
        to_torchao(nn.Linear(3, 3))
    with pytest.raises(StepError, match="kernel is 'gpu'"):
        to_torchao(network(4, False), "gpu")  # type: ignore[arg-type]
