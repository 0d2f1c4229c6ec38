"""Rounding with compensation, against the definition worked out by hand and against rounding to the nearest."""

from __future__ import annotations

import torch
from torch import nn

from cveff.compress.quant.capture import capture
from cveff.compress.quant.layers import find_layers
from cveff.compress.quant.network import insert
from cveff.compress.quant.placement import place
from cveff.compress.quant.ranges import Watch, weight_range
from cveff.compress.quant.round_weights import DAMPING, compensated, round_weights
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec((6, 6), 3, (0.5,) * 3, (0.5,) * 3)


def correlated(samples: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=generator).double()
    return torch.randn(samples, inputs, generator=generator).double() @ mixing


def test_each_error_is_made_up_for_by_the_least_squares_of_what_is_left() -> None:
    """GPTQ's definition: after a weight is fixed, the others take the values that change the output least."""
    generator = torch.Generator().manual_seed(1)
    rows = correlated(200, 6)
    moments = rows.T @ rows / 200
    weight, step = torch.randn(3, 6, generator=generator).double(), torch.full((3, 1), 0.2).double()
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(6)
    expected = torch.empty(3, 6).double()
    for output in range(3):
        left = list(moments.diagonal().argsort(descending=True, stable=True))
        target, current = weight[output].clone(), weight[output].clone()
        while left:
            column = int(left.pop(0))
            rounded = (current[column] / step[output, 0]).round().clamp(-127, 127) * step[output, 0]
            if left:
                rest = torch.tensor([int(item) for item in left])
                error = current[column] - rounded
                current[rest] += torch.linalg.solve(damped[rest][:, rest], damped[rest, column]) * error
            current[column] = rounded
        expected[output] = current
        assert not torch.equal(target, current)
    found = compensated(weight[None], step[None], moments[None], (-127, 127))[0]
    assert torch.allclose(found, expected, atol=1e-9)


def test_correlated_inputs_lose_less_than_by_rounding_to_the_nearest() -> None:
    rows = correlated(2000, 40)
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(2)).double()
    step = weight.abs().amax(1, keepdim=True) / 7
    nearest = (weight / step).round().clamp(-7, 7) * step
    found = compensated(weight[None], step[None], (rows.T @ rows / 2000)[None], (-7, 7))[0]
    assert torch.allclose((found / step).round() * step, found), "on the grid"
    assert (found / step).abs().max() <= 7.001
    errors = [((other - weight) @ rows.T).square().mean() for other in (found, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_zeros_stay_and_blocks_change_nothing() -> None:
    rows = correlated(500, 150)  # more inputs than a block holds
    weight = torch.randn(2, 150, generator=torch.Generator().manual_seed(3)).double()
    weight[:, ::3] = 0
    step = weight.abs().amax(1, keepdim=True) / 127
    found = compensated(weight[None], step[None], (rows.T @ rows / 500)[None], (-127, 127))[0]
    assert bool((found[:, ::3] == 0).all())
    assert ((found - weight) @ rows.T).square().mean() < (
        ((weight / step).round() * step - weight) @ rows.T
    ).square().mean()


def test_the_mean_of_every_layer_is_kept() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    images = torch.randn(32, 3, 6, 6) + 1
    exact = capture(module.eval(), SPEC)
    graph = capture(module.eval(), SPEC)
    placement = place(graph)
    roundings = insert(graph, placement)
    watch = Watch(graph, roundings.tensors)
    watch.see([images])
    for name, (low, high) in watch.ranges("minmax").items():
        roundings.tensors[name].set_range(torch.tensor(low), torch.tensor(high))
    for layer in find_layers(graph):
        rounding = roundings.weights[layer.name]
        rounding.set_range(*weight_range(layer.matrix(graph).flatten(0, 1).float(), 0, rounding.grid))
        rounding.scale.mul_(16)  # 4 bits: errors that are seen
    round_weights(graph, [images])
    with torch.no_grad():
        difference = (graph(images) - exact(images)).mean(0).abs().max()
        spread = exact(images).std()
    assert difference < 0.1 * spread
    for layer in find_layers(graph):
        rounding = roundings.weights[layer.name]
        weight = layer.matrix(graph).flatten(0, 1).float()
        assert torch.allclose(rounding(weight.reshape(len(weight), -1)), weight, atol=1e-6), (
            "weights are on their grid"
        )
