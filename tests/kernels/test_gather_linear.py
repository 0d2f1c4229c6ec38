"""Some outputs, or some inputs, of a linear layer: what the whole layer computes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cveff.errors import KernelError
from cveff.kernels.gather_linear import choice, some_inputs, some_outputs

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (5, 70, 70))),
    kept=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
    implementation=st.sampled_from(["reference", "cpu"]),
)
def test_they_are_parts_of_the_layer(
    sizes: tuple, kept: float, dtype: torch.dtype, biased: bool, implementation: str
) -> None:
    batch, inputs, outputs = sizes
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inputs, generator=generator).to(dtype) for n in (batch, outputs))
    bias = torch.randn(outputs, generator=generator).to(dtype) if biased else None
    wide_bias = None if bias is None else bias.double()
    whole = F.linear(x.double(), weight.double(), wide_bias)

    index = torch.randperm(outputs, generator=generator)[: round(kept * outputs)]
    found = some_outputs(x, weight, index, bias, implementation=implementation)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), whole[:, index], rtol=0, atol=_rounding(whole, dtype))

    index = torch.randperm(inputs, generator=generator)[: round(kept * inputs)]
    zeroed = torch.zeros_like(x).index_copy(1, index, x[:, index])
    expected = F.linear(zeroed.double(), weight.double(), wide_bias)
    found = some_inputs(x[:, index], weight.t().contiguous(), index, bias, implementation=implementation)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=_rounding(expected, dtype))


def _rounding(expected: torch.Tensor, dtype: torch.dtype) -> float:
    """The last digit of the largest answer: some inputs may add up to more than all of them."""
    return max(1.0, float(expected.abs().max())) * TOLERANCE[dtype]


def test_the_dispatcher_says_why() -> None:
    x, weight = torch.zeros(1, 6), torch.zeros(4, 6)
    assert choice(x, weight).implementation == "cpu"
    assert "not contiguous" in choice(x, weight.t().contiguous().t()).reason
    with pytest.raises(KernelError, match="no Triton kernel"):
        choice(x, weight, implementation="triton")
    with pytest.raises(KernelError, match="cpu kernel cannot run"):
        choice(x, weight.t().contiguous().t(), implementation="cpu")


@pytest.mark.parametrize(
    ("x", "weight", "index", "words"),
    [
        (torch.zeros(1, 5), torch.zeros(4, 6), torch.tensor([0]), "give \\(B, 6\\)"),
        (torch.zeros(1, 6), torch.zeros(4, 6).bfloat16(), torch.tensor([0]), "in one type"),
        (torch.zeros(1, 6), torch.zeros(4, 6), torch.tensor([4]), "index has 4; there are 0 to 3"),
        (torch.zeros(6), torch.zeros(4, 6), torch.tensor([0]), "a matrix"),
    ],
)
def test_wrong_input(x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        some_outputs(x, weight, index)
