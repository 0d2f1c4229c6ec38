"""Networks whose groups are known by hand, and a trained one with real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cveff
from cveff.compress.groups import Group, Member
from cveff.compress.samples import samples
from cveff.model import Model

ZOO = Path(__file__).parents[2] / "model_zoo" / "weights"


class ConvNet(nn.Module):
    """Convolution, batch norm, ReLU, convolution, ReLU, pool, classifier: 8 and 6 channels, 5 classes."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, kernel)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.bn(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def all_units(size: int) -> np.ndarray:
    return np.arange(size)


def norm_members(path: str, size: int) -> list[Member]:
    names = ("weight", "bias", "running_mean", "running_var")
    return [Member(f"{path}.{name}", 0, "scale", all_units(size)) for name in names]


@dataclass
class Known:
    module: nn.Module
    groups: tuple[Group, ...]


@pytest.fixture
def convnet() -> Callable[..., Known]:
    """A `ConvNet` with random weights and its two groups, "conv1" and "conv2"."""

    def make(kernel: int = 3) -> Known:
        torch.manual_seed(0)
        module = ConvNet(kernel).eval()
        first = Group(
            "conv1",
            8,
            (
                Member("conv1.weight", 0, "out", all_units(8)),
                *norm_members("bn", 8),
                Member("conv2.weight", 1, "in", all_units(8)),
            ),
        )
        second = Group(
            "conv2",
            6,
            (
                Member("conv2.weight", 0, "out", all_units(6)),
                Member("conv2.bias", 0, "out", all_units(6)),
                Member("fc.weight", 1, "in", all_units(6)),
            ),
        )
        return Known(module, (first, second))

    return make


@pytest.fixture
def images() -> list[tuple[Tensor, Tensor | None]]:
    """Four batches of noise with classes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 3, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator))
        for _ in range(4)
    ]


@pytest.fixture(scope="session")
def digits_model() -> Model:
    """The zoo's small residual network, trained on the digits. Copy it before changing it."""
    return cveff.load(ZOO / "digits")


@pytest.fixture(scope="session")
def digits_batches(digits_model: Model) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
    """Real images: "train" to calibrate on, "val" that no method has seen."""
    data = cveff.data.load("digits")
    spec = digits_model.spec.input
    assert data.train is not None
    return {"train": samples(data.train, spec, 128), "val": samples(data.val, spec, 128)}


@pytest.fixture(scope="session")
def digits_groups(digits_model: Model) -> tuple[Group, ...]:
    """The channels inside each residual block of `digits_model`."""
    groups = []
    for path, module in digits_model.module.named_modules():
        if type(module).__name__ == "BasicBlock":
            size = module.conv1.conv.out_channels
            members = (
                Member(f"{path}.conv1.conv.weight", 0, "out", all_units(size)),
                *norm_members(f"{path}.conv1.bn", size),
                Member(f"{path}.conv2.conv.weight", 1, "in", all_units(size)),
            )
            groups.append(Group(f"{path}.conv1.conv", size, members))
    return tuple(groups)
