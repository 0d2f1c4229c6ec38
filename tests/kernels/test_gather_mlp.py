"""The MLP of some neurons: every implementation is the dense MLP with the other neurons' values set to zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cveff.errors import KernelError
from cveff.kernels.gather_mlp import ACTIVATIONS, choice, gather_mlp
from cveff.kernels.gather_mlp.reference import ACTIVATIONS as FUNCTIONS

# bfloat16 rounds the answer once, by at most 2^-9 of it; sums are float32 in both.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def problem(batch: int, inputs: int, hidden: int, outputs: int, dtype: torch.dtype, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "x": random(batch, inputs),
        "up": random(hidden, inputs),
        "down": random(hidden, outputs),
        "gate": random(hidden, inputs),
        "up_bias": random(hidden),
        "gate_bias": random(hidden),
        "down_bias": random(outputs),
    }


def masked_dense(given: dict, neurons: Tensor, activation: str) -> Tensor:
    """The whole MLP in float64, with the values of neurons that are not listed set to zero."""
    wide = {name: tensor.double() for name, tensor in given.items() if tensor is not None}
    values = F.linear(wide["x"], wide["up"], wide.get("up_bias"))
    act = FUNCTIONS[activation]
    gates = F.linear(wide["x"], wide["gate"], wide.get("gate_bias")) if "gate" in wide else None
    values = act(values) if gates is None else values * act(gates)
    mask = torch.zeros(len(wide["up"]), dtype=torch.float64).index_fill(0, neurons.long(), 1.0)
    return F.linear(values * mask, wide["down"].T, wide.get("down_bias"))


def check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    scale = max(float(expected.abs().max()), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (5, 70, 40, 70))),
    kept=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    biased=st.booleans(),
    implementation=st.sampled_from(["reference", "cpu"]),
    number=st.sampled_from([torch.int32, torch.int64]),
)
def test_it_is_the_dense_mlp_without_the_other_neurons(
    sizes: tuple, kept: float, dtype: torch.dtype, activation: str, gated: bool, biased: bool,
    implementation: str, number: torch.dtype,
) -> None:  # fmt: skip
    given = problem(*sizes, dtype)
    if not gated:
        given |= {"gate": None, "gate_bias": None}
    if not biased:
        given |= {"up_bias": None, "gate_bias": None, "down_bias": None}
    neurons = torch.randperm(sizes[2])[: round(kept * sizes[2])].to(number)
    found = gather_mlp(**given, neurons=neurons, activation=activation, implementation=implementation)
    check(found, masked_dense(given, neurons, activation), dtype)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_values_that_are_known_already_stand_for_the_gate(implementation: str) -> None:
    given = problem(3, 20, 30, 17, torch.float32)
    neurons = torch.tensor([29, 0, 7, 7])  # a neuron listed twice counts twice
    known = F.silu(F.linear(given["x"], given["gate"], given["gate_bias"]))[:, neurons]
    gate, gate_bias = given.pop("gate"), given.pop("gate_bias")
    found = gather_mlp(**given, neurons=neurons, gated=known, implementation=implementation)
    expected = gather_mlp(
        **given, neurons=neurons, gate=gate, gate_bias=gate_bias, implementation="reference"
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_lie_in_wider_matrices_and_a_layers_weight_transposed(dtype: torch.dtype) -> None:
    given = problem(1, 37, 24, 37, dtype)
    wide = torch.randn(24, 2 * 37 + 3).to(dtype)
    layer = given["down"].T  # (outputs, H), as in nn.Linear, column by column
    given |= {"up": wide[:, :37], "gate": wide[:, 37:74], "down": layer.t()}
    assert choice(given["x"], given["up"], given["down"], given["gate"]).implementation == "cpu"
    neurons = torch.arange(0, 24, 3)
    check(gather_mlp(**given, neurons=neurons), masked_dense(given, neurons, "silu"), dtype)


def test_columns_that_are_not_contiguous_take_the_reference_and_say_so() -> None:
    given = problem(2, 16, 8, 16, torch.float32)
    given["down"] = given["down"].t().contiguous().t()
    found = choice(given["x"], given["up"], given["down"])
    assert found.implementation == "reference" and "not contiguous" in found.reason
    neurons = torch.tensor([1, 5])
    check(gather_mlp(**given, neurons=neurons), masked_dense(given, neurons, "silu"), torch.float32)
    with pytest.raises(KernelError, match="cpu kernel cannot run: a weight's rows"):
        gather_mlp(**given, neurons=neurons, implementation="cpu")


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_nothing_listed_is_the_bias_and_no_token_is_nothing(implementation: str) -> None:
    given = problem(2, 16, 8, 12, torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    found = gather_mlp(**given, neurons=none, implementation=implementation)
    assert torch.equal(found, given["down_bias"].expand(2, 12))
    empty = given | {"x": given["x"][:0]}
    assert gather_mlp(**empty, neurons=torch.arange(8), implementation=implementation).shape == (0, 12)


def test_one_token_may_come_without_a_batch() -> None:
    given = problem(1, 16, 8, 12, torch.float32)
    single = given | {"x": given["x"][0]}
    neurons = torch.arange(8)
    assert torch.equal(gather_mlp(**single, neurons=neurons), gather_mlp(**given, neurons=neurons)[0])


def test_float16_and_gradients_take_the_reference() -> None:
    given = problem(1, 16, 8, 12, torch.float16)
    assert "float16" in choice(given["x"], given["up"], given["down"]).reason
    found = gather_mlp(**given, neurons=torch.arange(8))
    assert found.dtype == torch.float16
    learned = problem(1, 16, 8, 12, torch.float32)
    learned["up"].requires_grad_()
    assert "gradient" in choice(learned["x"], learned["up"], learned["down"]).reason
    gather_mlp(**learned, neurons=torch.tensor([2])).sum().backward()
    assert learned["up"].grad is not None and learned["up"].grad[2].any()
    assert not learned["up"].grad[:2].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"neurons": torch.tensor([8])}, "neurons has 8; there are 0 to 7"),
        ({"neurons": torch.tensor([-1])}, "neurons has -1"),
        ({"neurons": torch.tensor([0.5])}, "give \\(K,\\) int32 or int64"),
        ({"activation": "swish"}, "activation is 'swish'; give one of silu"),
        ({"up": torch.zeros(8, 15)}, "up is \\(8, 15\\), and \\(8, 16\\) is wanted"),
        ({"down": torch.zeros(7, 12)}, "down is \\(7, 12\\)"),
        ({"up": torch.zeros(8, 16, dtype=torch.bfloat16)}, "up is torch.bfloat16 and x is torch.float32"),
        ({"gated": torch.zeros(2, 1)}, "both given"),
        ({"x": torch.zeros(1, 2, 16)}, "3, 2 and 2 dimensions"),
        ({"implementation": "cuda"}, "give one of reference, cpu, triton"),
        ({"implementation": "triton"}, "Triton"),
    ],
)
def test_wrong_input(change: dict, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match=words):
        gather_mlp(**(problem(2, 16, 8, 12, torch.float32) | {"neurons": torch.tensor([0])} | change))
