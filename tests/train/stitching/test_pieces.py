"""Pieces run one after the other are the network, to the bit, and so is how they train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from cveff.compress.blocks import macs
from cveff.compress.trace import trace
from cveff.errors import StepError
from cveff.model import Model, ModelSpec
from cveff.runtime.input_spec import InputSpec
from cveff.train.stitching.layout import Layout, as_map, from_map, layout_of, resized
from cveff.train.stitching.pieces import cut_points, pieces
from cveff.train.stitching.survey import staged

FAMILIES: dict[str, dict[str, Any]] = {
    "small_resnet_s": {},
    "resnet18": {"channels": [8, 8, 8, 16], "drop_rate": 0.3},
    "vit_tiny_patch16_224": {"embed_dim": 24, "num_heads": 2, "depth": 4, "drop_rate": 0.2, "img_size": 32},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "drop_path_rate": 0.2},
    "mobilenetv3_small_050": {"drop_rate": 0.2},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 8,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 1, 1),
        "img_size": 64,
        "window_size": 2,
    },
}


def build(name: str) -> tuple[nn.Module, InputSpec]:
    torch.manual_seed(0)
    side = {"swin_tiny_patch4_window7_224": 64}.get(name, 32)
    module = timm.create_model(name, num_classes=5, **FAMILIES[name])
    return module, InputSpec(size=(side, side), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_are_the_network_in_both_modes(name: str) -> None:
    module, spec = build(name)
    cuts = cut_points(module)
    assert len(cuts) >= 4
    x = torch.randn(3, 3, *spec.size)
    for mode in (True, False):
        answers = []
        for whole in (module, nn.Sequential(*pieces(copy.deepcopy(module), cuts))):
            torch.manual_seed(1)  # dropped paths and units
            answers.append(whole.train(mode)(x))
        assert torch.equal(*answers)
    parts = pieces(module, cuts)
    assert sum(item.numel() for part in parts for item in part.parameters()) == sum(
        item.numel() for item in module.parameters()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_cost_what_the_trace_says(name: str) -> None:
    module, spec = build(name)
    parent = staged(Model(ModelSpec(name, {}, spec), module), 3).parent
    assert len(parent.cuts) == len(parent.layouts) == 2 and len(parent.macs) == 3
    assert sum(parent.macs) == macs(trace(module, spec))
    assert sum(parent.parameters) == sum(item.numel() for item in module.parameters())


def test_a_cut_behind_which_something_older_is_used_is_none() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.c(x + self.b(x))

    assert cut_points(Skipping()) == ("a", "c")
    with pytest.raises(StepError, match="no stage that ends at 'b'; it can be cut behind a, c"):
        pieces(Skipping(), ["b"])
    with pytest.raises(StepError, match="order"):
        pieces(Skipping(), ["c", "a"])


def test_networks_that_choose_by_the_image_are_refused() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(1, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(StepError, match="Choosing cannot be cut into stages"):
        cut_points(Choosing())

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x + 1

    with pytest.raises(StepError, match="does not return one tensor"):
        cut_points(Two())


@pytest.mark.parametrize(
    "shape, layout",
    [
        ((2, 5, 4, 6), Layout("planes", 5, 4, 6)),
        ((2, 4, 6, 5), Layout("channels-last", 5, 4, 6)),
        ((2, 24, 5), Layout("tokens", 5, 4, 6)),
        ((2, 25, 5), Layout("tokens", 5, 4, 6, prefix=1)),
    ],
)
def test_layouts_are_recognised_and_come_back(shape: tuple[int, ...], layout: Layout) -> None:
    network = nn.Module()
    network.num_prefix_tokens = 1  # type: ignore[assignment]
    x = torch.randn(shape)
    assert layout_of(x, network, (32, 48)) == layout
    features = as_map(x, layout)
    assert features.shape == (2, 5, 4, 6)
    assert torch.equal(
        from_map(features, layout, x[0, : layout.prefix] if layout.prefix else None)[:, 1:], x[:, 1:]
    )
    if layout.form == "tokens":
        whole = as_map(x, layout, with_prefix=True)
        assert torch.equal(from_map(whole, layout, with_prefix=True), x)


def test_vectors_and_lists_have_no_layout() -> None:
    assert layout_of(torch.zeros(2, 5), nn.Module(), (8, 8)) is None
    assert layout_of([torch.zeros(2, 5, 4, 4)], nn.Module(), (8, 8)) is None
    assert layout_of(torch.zeros(2, 7, 5), nn.Module(), (8, 8)) is None  # 7 tokens are no square


def test_resizing_takes_means_of_cells_and_interpolates_else() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(resized(x, (2, 2)), torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    assert torch.equal(resized(x, (4, 4)), x)
    assert resized(x, (7, 7)).shape == (1, 1, 7, 7) and resized(x, (3, 3)).shape == (1, 1, 3, 3)
    assert float(resized(x, (8, 8)).mean()) == pytest.approx(7.5)
