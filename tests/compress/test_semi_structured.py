"""Packing of 2:4 weights: what can be packed is known without a GPU, and the packed layer is the dense one on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cveff.compress.semi_structured import semi_structured, why_dense
from cveff.compress.sparse_masks import keep_two_of_four
from cveff.errors import StepError


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    return (weight * keep_two_of_four(weight.abs())).to(dtype)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (two_of_four(32, 64), None),
        (two_of_four(32, 32, torch.float32), None),
        (two_of_four(1000, 64), "(1000, 64) is no multiple of (32, 64)"),
        (two_of_four(32, 96, torch.bfloat16), "(32, 96) is no multiple"),
        (torch.ones(32, 64).half(), "not 2:4"),
        (two_of_four(32, 64).double(), "torch.float64 is none of"),
    ],
)
def test_why_a_layer_stays_dense(weight: torch.Tensor, words: str | None) -> None:
    found = why_dense(weight)
    assert found is None if words is None else words in str(found)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(StepError, match="packed for NVIDIA GPUs, and the network is on cpu"):
        semi_structured(nn.Linear(64, 32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_packed_layers_answer_as_dense_ones_do() -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).cuda().half()
    with torch.no_grad():
        network[0].weight.copy_(two_of_four(64, 64))
        x = torch.randn(197, 64, device="cuda", dtype=torch.float16)
        expected = network(x)
        assert list(semi_structured(network)) == ["2"]
        torch.testing.assert_close(network(x), expected, rtol=1e-2, atol=1e-2)
