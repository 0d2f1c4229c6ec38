"""Rounding as ONNX defines it, and the gradients of LSQ+."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cveff.compress.quant.fake_quant import TINY, FakeQuantize, Grid
from cveff.errors import StepError


def onnx_round(x: np.ndarray, scale: float, zero: int, kind: int) -> np.ndarray:
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor("s", TensorProto.FLOAT, [], [scale]), helper.make_tensor("z", kind, [], [zero])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@settings(deadline=None, max_examples=40)
@given(
    low=st.floats(-10, 0),
    high=st.floats(0, 10),
    signed=st.booleans(),
    seed=st.integers(0, 2**16),
    ties=st.booleans(),
)
def test_rounds_exactly_as_onnx_does(low: float, high: float, signed: bool, seed: int, ties: bool) -> None:
    rounding = FakeQuantize(Grid(signed=signed))
    rounding.set_range(torch.tensor(low), torch.tensor(high))
    x = np.random.default_rng(seed).uniform(1.5 * low - 1, 1.5 * high + 1, 500).astype(np.float32)
    if ties:
        x = (np.round(x / rounding.scale.item()) + 0.5).astype(np.float32) * rounding.scale.numpy()
    kind = TensorProto.INT8 if signed else TensorProto.UINT8
    expected = onnx_round(x, rounding.scale.item(), int(rounding.zero_point), kind)
    np.testing.assert_array_equal(rounding(torch.from_numpy(x)).numpy(), expected)


def test_zero_is_on_every_grid() -> None:
    for grid in (Grid(), Grid(signed=True), Grid(signed=True, symmetric=True), Grid(4), Grid(symmetric=True)):
        rounding = FakeQuantize(grid)
        rounding.set_range(torch.tensor(0.3), torch.tensor(5.0))
        assert rounding(torch.zeros(3)).eq(0).all()
        rounding.set_range(torch.tensor(-5.0), torch.tensor(-0.3))
        assert rounding(torch.zeros(3)).eq(0).all()


def test_a_constant_zero_tensor_gets_a_step_and_stays_zero() -> None:
    rounding = FakeQuantize(Grid())
    rounding.set_range(torch.tensor(0.0), torch.tensor(0.0))
    assert rounding.scale.item() == pytest.approx(TINY)
    assert rounding(torch.zeros(4)).eq(0).all()


def test_rounding_twice_changes_nothing() -> None:
    rounding = FakeQuantize(Grid(signed=True, symmetric=True, narrow=True), 3, 0)
    x = torch.randn(3, 50)
    rounding.set_range(-x.abs().amax(1), x.abs().amax(1))
    once = rounding(x)
    assert torch.equal(rounding(once), once)
    assert rounding.integers(x).abs().max() == 127


@pytest.mark.parametrize(
    ("minimum", "maximum", "message"),
    [
        (float("nan"), 1.0, "NaN or infinite"),
        (0.0, float("inf"), "NaN or infinite"),
        (1.0, -1.0, "above its maximum"),
    ],
)
def test_ranges_that_are_none_are_refused(minimum: float, maximum: float, message: str) -> None:
    with pytest.raises(StepError, match=message):
        Grid().steps(torch.tensor(minimum), torch.tensor(maximum))


def test_steps_of_another_shape_or_sign_are_refused() -> None:
    rounding = FakeQuantize(Grid(), 3, 0)
    with pytest.raises(StepError, match="shape"):
        rounding.set_steps(torch.ones(2), torch.zeros(2))
    with pytest.raises(StepError, match="positive"):
        rounding.set_steps(torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3))


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(StepError, match="bits is 9"):
        Grid(9)


def test_gradients_are_those_of_lsq_plus() -> None:
    """By hand, from the papers' equations: x inside, clipped above, clipped below."""
    rounding = FakeQuantize(Grid(bits=2))  # 0 … 3
    rounding.set_steps(torch.tensor(0.5), torch.tensor(1.0))
    rounding.moves = (torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True))
    x = torch.tensor([[0.3, 5.0, -5.0]], requires_grad=True)
    rounding(x).sum().backward()
    factor = 1 / (3 * 3) ** 0.5
    assert torch.equal(x.grad, torch.tensor([[1.0, 0.0, 0.0]]))
    # inside: round(v) - v = 1 - 0.6; above: high - z = 2; below: low - z = -1
    # Of the scale's logarithm, and of the zero point in halves of the grid.
    assert rounding.moves[0].grad.item() == pytest.approx((0.4 + 2 - 1) * factor * 0.5)
    assert rounding.moves[1].grad.item() == pytest.approx(-2 * 0.5 * factor * 1.5)


def test_moves_are_taken_into_the_steps() -> None:
    rounding = FakeQuantize(Grid())
    rounding.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    scale, zero = float(rounding.scale), float(rounding.zero_point)
    rounding.moves = (torch.tensor(0.1, requires_grad=True), torch.tensor(0.01, requires_grad=True))
    x = torch.randn(100)
    moved = rounding(x).detach()
    rounding.settle()
    assert torch.equal(rounding(x).detach(), moved), "as they were while they moved"
    assert float(rounding.scale) == pytest.approx(scale * math.exp(0.1))
    assert float(rounding.zero_point) == pytest.approx(zero + 1.275)
    assert all(float(move) == 0 for move in rounding.moves)
    assert list(rounding.state_dict()) == ["scale", "zero_point"] and not list(rounding.parameters())


def test_switched_off_it_passes_values_on() -> None:
    rounding = FakeQuantize(Grid())
    rounding.enabled = False
    x = torch.randn(5)
    assert rounding(x) is x
