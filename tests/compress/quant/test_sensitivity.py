"""Prices of roundings against the divergence that each causes when it is alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cveff.compress.quant.capture import capture
from cveff.compress.quant.layers import find_layers
from cveff.compress.quant.network import insert
from cveff.compress.quant.placement import place
from cveff.compress.quant.ranges import Watch, rounding_off, weight_range
from cveff.compress.quant.sensitivity import rounding_costs
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec((8, 8), 3, (0.5,) * 3, (0.5,) * 3)


def test_prices_are_the_divergences_of_single_roundings() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 5),
    )
    with torch.no_grad():
        module[5].weight.mul_(6)
    images = torch.randn(1500, 3, 8, 8)
    exact, graph = capture(module.eval(), SPEC), capture(module, SPEC)
    roundings = insert(graph, place(graph))
    watch = Watch(graph, roundings.tensors)
    watch.see([images])
    for name, (low, high) in watch.ranges("minmax").items():
        roundings.tensors[name].set_range(torch.tensor(low), torch.tensor(high))
        roundings.tensors[name].scale.mul_(4)  # coarse enough to stand out of float32's own error
    for layer in find_layers(graph):
        rounding = roundings.weights[layer.name]
        rounding.set_range(*weight_range(layer.matrix(graph).flatten(0, 1).float(), 0, rounding.grid))
        rounding.scale.mul_(4)
        with torch.no_grad():
            weight = graph.get_parameter(layer.weight)
            weight.copy_(rounding(weight))
    costs = rounding_costs(exact, graph, roundings, images.split(250))
    assert set(costs.tensors) == set(roundings.tensors) and set(costs.weights) == set(roundings.weights)
    with torch.no_grad():
        clean = exact(images).log_softmax(1)

        def divergence(other: torch.Tensor) -> float:
            return float((clean.exp() * (clean - other.log_softmax(1))).sum(1).mean())

        for name, cost in costs.tensors.items():
            single = capture(module, SPEC)
            alone = insert(single, place(single))
            for other, rounding in roundings.tensors.items():
                alone.tensors[other].set_steps(rounding.scale, rounding.zero_point)
            off = [part for part in single.modules() if part is not alone.tensors[name]]
            with rounding_off(single, off):  # type: ignore[arg-type]
                assert cost.nats == pytest.approx(divergence(single(images)), rel=0.25), name
        for layer in find_layers(exact):
            kept = exact.get_parameter(layer.weight).clone()
            exact.get_parameter(layer.weight).copy_(graph.get_parameter(layer.weight))
            assert costs.weights[layer.name].nats == pytest.approx(divergence(exact(images)), rel=0.25)
            exact.get_parameter(layer.weight).copy_(kept)
    finest = max(cost.decibels for cost in costs.tensors.values())
    assert 20 < finest < 60
    assert all(parameter.grad is None and parameter.requires_grad for parameter in exact.parameters())
