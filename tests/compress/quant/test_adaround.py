"""Learned roundings reproduce a block better than the nearest do, and end on the grid."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from cveff.compress.quant.adaround import Reconstruction, blocks, reconstruct
from cveff.compress.quant.capture import capture
from cveff.compress.quant.layers import find_layers
from cveff.compress.quant.network import Roundings, insert
from cveff.compress.quant.placement import place
from cveff.compress.quant.ranges import Watch, weight_range
from cveff.errors import StepError
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec((8, 8), 3, (0.5,) * 3, (0.5,) * 3)


class Net(nn.Module):
    """A stem, a residual block of two convolutions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


def rounded(module: nn.Module, images: torch.Tensor) -> tuple[fx.GraphModule, fx.GraphModule, Roundings]:
    exact, graph = capture(module.eval(), SPEC), capture(module.eval(), SPEC)
    roundings = insert(graph, place(graph))
    watch = Watch(graph, roundings.tensors)
    watch.see([images])
    for name, (low, high) in watch.ranges("minmax").items():
        roundings.tensors[name].set_range(torch.tensor(low), torch.tensor(high))
    for layer in find_layers(graph):
        rounding = roundings.weights[layer.name]
        rounding.set_range(*weight_range(layer.matrix(graph).flatten(0, 1).float(), 0, rounding.grid))
        rounding.scale.mul_(18)  # 3 bits: the choice matters
    return graph, exact, roundings


def test_learned_roundings_are_better_than_the_nearest_on_other_images() -> None:
    torch.manual_seed(0)
    images, fresh = torch.randn(128, 3, 8, 8), torch.randn(256, 3, 8, 8)
    graph, exact, roundings = rounded(Net(), images)
    with torch.no_grad():
        expected = exact(fresh)
        before = (graph(fresh) - expected).square().mean()
        reconstruct(graph, exact, list(images.split(32)), Reconstruction(steps=200))
        after = (graph(fresh) - expected).square().mean()
    assert after < 0.6 * before
    for layer in find_layers(graph):
        rounding, weight = roundings.weights[layer.name], graph.get_parameter(layer.weight)
        assert torch.allclose(rounding(weight), weight, atol=1e-6), "on the grid"
        distance = (weight - exact.get_parameter(layer.weight)).abs().flatten(1).amax(1)
        assert bool((distance <= rounding.scale * 1.001).all()), "one of the two neighbours"


def test_blocks_end_where_the_whole_network_passes_through_one_tensor() -> None:
    torch.manual_seed(0)
    graph, _, _ = rounded(Net(), torch.randn(8, 3, 8, 8))
    layers = find_layers(graph)
    names = [[layer.weight.partition(".")[0] for layer in block.layers] for block in blocks(graph, layers)]
    assert names == [["stem"], ["first", "second"], ["head"]]


def test_no_steps_are_refused() -> None:
    with pytest.raises(StepError, match="steps are 0"):
        Reconstruction(steps=0)
