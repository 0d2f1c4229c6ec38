"""Where the "tensorrt" scheme rounds: what its int8 kernels fuse, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cveff
from cveff.compress.quant.capture import capture
from cveff.compress.quant.placement import Placement, place
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(8, 8), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


class Net(nn.Module):
    """Two convolutions of 4 channels, `join` between what they return, a mean and a classifier."""

    def __init__(self, join: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.pool, self.fc = nn.MaxPool2d(3, 1, 1), nn.Linear(4, 5)
        self.table = nn.Parameter(torch.randn(4, 4))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.join(self, torch.relu(self.first(x))).mean((2, 3)))


def placed(join: Callable[[Net, Tensor], Tensor]) -> Placement:
    return place(capture(Net(join).eval(), SPEC), "tensorrt")


def readers(placement: Placement) -> dict[str, tuple[str, ...]]:
    return {site.tensor: site.readers for site in placement.sites}


def test_the_skip_of_an_addition_shares_the_convolutions_rounding() -> None:
    """Conv + Add + ReLU run as one; the convolution's own result is not rounded before it is added."""
    found = readers(placed(lambda net, x: torch.relu(net.second(x) + x)))
    assert found == {
        "input": ("first:conv2d:0",),
        ":relu:0": (":add:0", "second:conv2d:0"),
        ":mean:0": ("fc:linear:0",),
    }


def test_of_two_convolutions_added_one_is_rounded() -> None:
    found = readers(placed(lambda net, x: net.second(x) + net.second(torch.sigmoid(x))))
    assert [tensor for tensor in found if "second" in tensor] == ["second:conv2d:1"]


@pytest.mark.parametrize(
    "join",
    [
        lambda net, x: torch.relu(net.second(x)) + x,  # the convolution ends in a ReLU of its own
        lambda net, x: net.second(x) + x.mean((2, 3), keepdim=True),  # broadcast
        lambda net, x: torch.add(net.second(x), x, alpha=2),
        lambda net, x: (y := net.second(x)) + y,
        lambda net, x: (y := net.second(x)) + x + torch.exp(y),  # others read the convolution
    ],
)
def test_additions_that_cannot_be_fused_are_not_rounded(join: Callable[[Net, Tensor], Tensor]) -> None:
    assert not any("add" in reader for names in readers(placed(join)).values() for reader in names)


def test_products_are_rounded_on_both_sides_or_not_at_all() -> None:
    def attention(net: nn.Module, x: Tensor) -> Tensor:
        rows = x.flatten(2)
        return (torch.softmax(rows @ rows.transpose(1, 2), -1) @ torch.exp(rows)).unflatten(2, (8, 8))

    found = readers(placed(attention))
    assert found[":flatten:0"] == (":matmul:0",) and found[":transpose:0"] == (":matmul:0",)
    assert found[":softmax:0"] == found[":exp:0"] == (":matmul:1",)

    def by_a_table(net: nn.Module, x: Tensor) -> Tensor:
        return (net.table @ x.flatten(2)).unflatten(2, (8, 8))

    assert not any("matmul" in reader for names in readers(placed(by_a_table)).values() for reader in names)


def test_padding_that_others_read_is_rounded_behind() -> None:
    def join(net: nn.Module, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (1, 1, 1, 1))
        return torch.cat([net.pool(padded), net.second(padded)], 1)[:, :4]

    assert readers(placed(join))[":pad:0"] == ("second:conv2d:0",)
    alone = readers(placed(lambda net, x: net.second(nn.functional.pad(x, (1, 1, 1, 1)))))
    assert alone[":relu:0"] == (":pad:0",)


def test_layers_of_constants_stay_in_floats() -> None:
    def join(net: nn.Module, x: Tensor) -> Tensor:
        return net.second(x) * net.fc(net.table).sum()

    assert [site.reader for site in placed(join).weights] == [
        "first:conv2d:0",
        "second:conv2d:0",
        "fc:linear:1",
    ]


def test_zero_points_are_zero_and_weights_have_a_step_a_channel() -> None:
    vit = cveff.create("vit_tiny_patch16_224", 5, image_size=16, timm_arguments={"depth": 1, "embed_dim": 48})
    found = place(capture(vit.module, vit.spec.input), "tensorrt")
    assert found.scheme == "tensorrt"
    assert all(site.signed and site.symmetric for site in found.sites)
    assert all(site.axis == 0 and site.grid.narrow for site in found.weights)
    # Patches, query-key-value, projection, two of the MLP, classifier; and both sides of both products.
    assert len(found.weights) == 6 and len(found.sites) == 6 + 4
