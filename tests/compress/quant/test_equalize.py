"""Rescaled channels leave the network as it is and even its ranges out."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from cveff.compress.quant.capture import capture
from cveff.compress.quant.channel_groups import channel_groups
from cveff.compress.quant.equalize import _channel_ranges, equalize
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec((32, 32), 3, (0.5,) * 3, (0.5,) * 3)


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "architecture",
    [
        "resnet18",
        "mobilenetv2_050",
        "efficientnet_lite0",
        "mobilenetv3_small_050",
        "vit_tiny_patch16_224",
        "regnety_002",
    ],
)
def test_the_network_stays_as_it_is(architecture: str) -> None:
    torch.manual_seed(0)
    given = {"img_size": 32, "depth": 2} if architecture.startswith("vit") else {}
    module = timm.create_model(architecture, num_classes=5, **given)
    for part in module.modules():  # channels of unequal ranges, as trained networks have them
        if isinstance(part, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(part.weight, 0.1, 2.0)
            nn.init.uniform_(part.bias, -0.2, 0.5)
    graph = capture(module.eval(), SPEC)
    x = images()
    with torch.no_grad():
        before = graph(x)
        groups = channel_groups(graph)
        assert len(groups) >= 2
        old = _channel_ranges(graph, groups, [x])
        equalize(graph, groups, [x], alpha=1.0)
        new = _channel_ranges(graph, groups, [x])
        assert torch.allclose(graph(x), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))

    def evenness(ranges: dict[torch.fx.Node, torch.Tensor], group: object) -> float:
        reach = torch.stack([ranges[tensor] / ranges[tensor].max() for tensor in group.tensors])  # type: ignore[attr-defined]
        return float(reach[reach > 0].log().mean())

    assert sum(evenness(new, group) for group in groups) > sum(evenness(old, group) for group in groups)


class _Net(nn.Module):
    """A residual stream, a gate, a clamp and what breaks a group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.wide = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.swish = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.b(torch.relu(self.a(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = torch.nn.functional.relu6(self.wide(x))
        x = torch.relu(self.depthwise(x))
        return self.head(torch.nn.functional.silu(self.swish(x)).mean((2, 3)))


def test_groups_are_what_can_be_rescaled() -> None:
    torch.manual_seed(0)
    groups = channel_groups(capture(_Net().eval(), SPEC))
    layers = [
        (
            sorted(path for path in group.divided if path.endswith("weight")),
            [layer.weight for layer in group.readers],
        )
        for group in groups
    ]
    assert (["b.weight", "stem.weight"], ["a.weight", "gate.weight", "wide.weight"]) in [
        (made, sorted(read)) for made, read in layers
    ]
    assert (["a.weight"], ["b.weight"]) in layers
    assert (["depthwise.weight"], ["swish.weight"]) in layers
    assert len(layers) == 3, "what the images, a clamp, a sigmoid's factor or the logits touch is no group"
