"""What kernels without VNNI clip, against sums computed pair by pair."""

from __future__ import annotations

import torch
from torch import nn

from cveff.compress.quant.capture import capture
from cveff.compress.quant.layers import find_layers
from cveff.compress.quant.network import Roundings, insert
from cveff.compress.quant.placement import place
from cveff.compress.quant.ranges import Watch, weight_range
from cveff.compress.quant.saturation import LIMIT, _clip, _in_order, narrow, predict_saturation
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec((6, 6), 3, (0.5,) * 3, (0.5,) * 3)


def test_clipping_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (2, 5, 7), generator=generator).float()
    whole = torch.randint(-127, 128, (2, 3, 7), generator=generator).float()
    exact, counts, wrong = _clip(rows, whole)
    expected_counts = torch.zeros(2, 3)
    for group in range(2):
        for output in range(3):
            for sample in range(5):
                products = [
                    float(a * b) for a, b in zip(rows[group, sample], whole[group, output], strict=True)
                ]
                pairs = [sum(products[index : index + 2]) for index in range(0, 7, 2)]
                clipped = [min(max(pair, -LIMIT - 1), LIMIT) for pair in pairs]
                assert exact[group, output, sample] == sum(products)
                assert wrong[group, output, sample] == sum(clipped) - sum(products)
                expected_counts[group, output] += sum(a != b for a, b in zip(pairs, clipped, strict=True))
    assert counts.tolist() == expected_counts.flatten().tolist()


def test_neighbours_are_channels_then_columns_then_rows() -> None:
    """As ONNX Runtime's kernels were seen to clip on a processor without VNNI (docs/quantize.md)."""
    graph = capture(nn.Conv2d(3, 4, 3), SPEC)
    (layer,) = find_layers(graph)
    order = _in_order(layer, torch.arange(27)[None, None])[0, 0].tolist()
    # Channel c of tap t is number 9 c + t; the first pairs are channels 0 and 1 of tap 0, then 2 and the next tap's 0.
    assert order[:6] == [0, 9, 18, 1, 10, 19]


def rounded(module: nn.Module, images: torch.Tensor) -> tuple[torch.fx.GraphModule, Roundings]:
    graph = capture(module.eval(), SPEC)
    placement = place(graph)
    roundings = insert(graph, placement)
    watch = Watch(graph, roundings.tensors)
    watch.see([images])
    for name, (low, high) in watch.ranges("minmax").items():
        roundings.tensors[name].set_range(torch.tensor(low), torch.tensor(high))
    for layer in find_layers(graph):
        rounding = roundings.weights[layer.name]
        weight = layer.matrix(graph).flatten(0, 1).float()
        rounding.set_range(*weight_range(weight, 0, rounding.grid))
    return graph, roundings


def network(scale: float) -> nn.Module:
    """Two convolutions; the second's inputs are all positive and its first output channel has large weights only."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten(), nn.Linear(144, 2)
    )
    with torch.no_grad():
        module[0].bias.fill_(3.0)
        module[2].weight[0] = scale * module[2].weight[0].sign().abs() + (1 - scale) * module[2].weight[0]
    return module


def test_channels_that_clip_are_found_and_no_longer_do_when_narrowed() -> None:
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    graph, roundings = rounded(network(1.0), images)
    found = predict_saturation(graph, [images])
    name = next(name for name in found if name.startswith("2:"))
    assert found[name].share[0] > 0.5 and 1.5 < found[name].excess[0] < 2.05
    assert bool(found[name].costs[0])
    before = roundings.weights[name].scale.clone()
    narrowed = narrow(graph, found)
    assert narrowed[name] == int(found[name].costs.sum())
    after = roundings.weights[name].scale
    kept = ~found[name].costs
    assert torch.equal(after[kept], before[kept]), "other channels keep their steps"
    again = predict_saturation(graph, [images]).get(name)
    assert again is None or not bool(again.share[found[name].costs].any())


def test_depthwise_convolutions_do_not_clip() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3, padding=1), nn.Flatten(), nn.Linear(108, 2))
    with torch.no_grad():
        module[0].weight.fill_(1.0)
    images = torch.rand(4, 3, 6, 6)
    graph, _ = rounded(module, images)
    assert not any(name.startswith("0:") for name in predict_saturation(graph, [images]))


def test_zeros_padded_around_an_image_do_not_hide_the_rounding() -> None:
    module = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    with torch.no_grad():
        module[1].weight.fill_(1.0)
    images = torch.rand(4, 3, 6, 6)
    graph, _ = rounded(module, images)
    assert any(name.startswith("1:") for name in predict_saturation(graph, [images]))
