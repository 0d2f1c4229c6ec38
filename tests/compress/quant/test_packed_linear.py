"""The packed layer: its layout, its arithmetic, and what it refuses to load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cveff.compress.quant.group_rounding import round_nearest
from cveff.compress.quant.packed_linear import PackedLinear, WeightGrid, pack, unpack
from cveff.errors import CheckpointError, StepError

GRIDS = [
    WeightGrid(bits, group, symmetric) for bits in (4, 8) for group in (32, 64) for symmetric in (True, False)
]


def filled(grid: WeightGrid, inputs: int = 80, outputs: int = 6) -> tuple[PackedLinear, Any]:
    torch.manual_seed(0)
    rounded = round_nearest(torch.randn(outputs, inputs), grid)
    layer = PackedLinear(inputs, outputs, grid)
    layer.put(rounded.integers, rounded.scales, rounded.zero_points)
    torch.nn.init.normal_(layer.bias)
    return layer, rounded


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("inputs", [32, 80, 160])
def test_computes_with_the_rounded_weight(grid: WeightGrid, inputs: int) -> None:
    layer, rounded = filled(grid, inputs)
    assert torch.equal(layer.integers(), rounded.integers.to(torch.uint8))
    assert torch.equal(layer.zeros(), rounded.zero_points.to(torch.uint8))
    torch.testing.assert_close(layer.weight, rounded.weight(grid.group_size).float(), rtol=1e-6, atol=1e-7)
    x = torch.randn(2, 3, inputs)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 6, 7])
def test_packing_is_undone(bits: int, count: int) -> None:
    values = torch.randint(0, 2**bits, (3, count))
    assert torch.equal(unpack(pack(values, bits), bits)[:, :count].long(), values)


def test_the_first_of_two_is_the_low_half() -> None:
    assert pack(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x21, 0x03]]


def test_weighs_what_it_says() -> None:
    layer, _ = filled(WeightGrid(4, 64), inputs=256, outputs=32)
    # Half a byte a weight; a float and half a byte for each of the 4 groups of an output.
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 32 * (256 // 2 + 4 * 4 + 2)


def test_the_padding_of_a_short_group_stands_for_zero() -> None:
    layer, _ = filled(WeightGrid(4, 64), inputs=80)
    padding = unpack(layer.packed.flatten(1), 4)[:, 80:]
    assert torch.equal(padding, layer.zeros()[:, 1:].expand(-1, 48))


def test_half_precision_activations_keep_their_dtype_and_gradients_reach_them() -> None:
    layer, _ = filled(WeightGrid(4, 32))
    layer.bias = torch.nn.Parameter(layer.bias.detach().bfloat16())
    x = torch.randn(2, 80, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    torch.testing.assert_close(x.grad[0], layer.weight.bfloat16().sum(0), rtol=0.05, atol=0.05)


def test_the_operator_of_the_exporter_computes_the_same() -> None:
    layer, _ = filled(WeightGrid(4, 32))
    x = torch.randn(2, 80)
    arguments = (x, layer.packed, layer.scales, layer.zero_points, 80, 4, 32)
    y = torch.ops.cveff.matmul_nbits(*arguments)
    torch.testing.assert_close(y + layer.bias, layer(x))
    torch.library.opcheck(
        torch.ops.cveff.matmul_nbits, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"bits": 3}, "3 bits.*give 4 or 8"),
        ({"bits": 4.0, "group_size": 48}, "48.*give one of 32, 64, 128"),
        ({"group_size": 0}, "group size is 0"),
        ({"symmetric": 1}, "symmetric is 1"),
    ],
)
def test_other_grids_are_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(StepError, match=text):
        WeightGrid(**values)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("packed", lambda t: t.float(), "packed holds torch.float32, not torch.uint8"),
        ("zero_points", lambda t: t.float(), "zero_points holds torch.float32"),
        ("scales", lambda t: t.to(torch.uint8), "scales holds torch.uint8"),
        ("scales", lambda t: t.fill_(float("nan")), "zeros, NaN or infinity"),
        ("scales", torch.zeros_like, "zeros, NaN or infinity"),
    ],
)
def test_damaged_buffers_are_refused(name: str, value: Any, text: str) -> None:
    layer, _ = filled(WeightGrid(4, 32))
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    state[name] = value(state[name])
    holder = torch.nn.Sequential(PackedLinear(80, 6, WeightGrid(4, 32)))
    with pytest.raises(CheckpointError, match=rf"0\.{name}|0\.scales") as caught:
        holder.load_state_dict({f"0.{key}": tensor for key, tensor in state.items()})
    assert text.partition(",")[0] in str(caught.value)


def test_buffers_of_another_size_are_refused() -> None:
    layer, _ = filled(WeightGrid(4, 32))
    state = layer.state_dict()
    state["packed"] = state["packed"][:, :-1]
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        PackedLinear(80, 6, WeightGrid(4, 32)).load_state_dict(state)
