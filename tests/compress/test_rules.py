"""What each operator does to channels: groups of tiny networks known by hand, every one proven by the oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.compress.analysis import analyze, check
from cveff.compress.groups import Analysis
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)


class Net(nn.Module):
    """Layers by name, and a function of them and the image."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._call = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self, x)


def conv(inputs: int, outputs: int, kernel: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def standardised(weight: Tensor) -> Tensor:
    flat = weight.view(1, len(weight), -1)
    return F.batch_norm(flat, None, None, training=True).view_as(weight)


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def analysed(net: nn.Module) -> Analysis:
    return analyze(net, SPEC)


def free(analysis: Analysis) -> dict[str, int]:
    return {group.name: group.size for group in analysis.groups}


def reasons(analysis: Analysis) -> dict[str, str]:
    return {group.name: group.reason for group in analysis.frozen}


def fc(size: int) -> nn.Linear:
    return nn.Linear(size, 5)


def two(**layers: nn.Module) -> dict[str, nn.Module]:
    """Two convolutions of 8 channels on the image, and a classifier of 8."""
    return {"a": conv(3, 8), "b": conv(3, 8), "fc": fc(8), **layers}


PRUNED: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "a chain": (
        lambda: Net(lambda s, x: s.fc(mean(s.b(F.relu(s.a(x))))), a=conv(3, 8), b=conv(8, 6), fc=fc(6)),
        {"a": 8, "b": 6},
    ),
    "a residual addition": (
        lambda: Net(lambda s, x: s.fc(mean(s.a(x) + s.b(x))), **two()),
        {"a": 8},
    ),
    "a residual around a block": (
        lambda: Net(
            lambda s, x: s.fc(mean((y := s.a(x)) + s.c(F.relu(s.b(y))))),
            a=conv(3, 8), b=conv(8, 12), c=conv(12, 8), fc=fc(8),
        ),
        {"a": 8, "b": 12},
    ),
    "a concatenation": (
        lambda: Net(lambda s, x: s.fc(mean(torch.cat([s.a(x), s.b(x)], 1))), a=conv(3, 8), b=conv(3, 6), fc=fc(14)),
        {"a": 8, "b": 6},
    ),
    "a stack that is added up": (
        lambda: Net(lambda s, x: s.fc(mean(torch.stack([s.a(x), s.b(x)], 1).sum(1))), **two()),
        {"a": 8},
    ),
    "a chunk whose halves multiply": (
        lambda: Net(
            lambda s, x: s.fc(mean((p := s.a(x).chunk(2, 1))[0] * torch.sigmoid(p[1]))), a=conv(3, 16), fc=fc(8)
        ),
        {"a": 8},
    ),
    "a gated linear unit": (
        lambda: Net(lambda s, x: s.fc(mean(F.glu(s.a(x), 1))), a=conv(3, 16), fc=fc(8)),
        {"a": 8},
    ),
    "a split into unequal parts": (
        lambda: Net(
            lambda s, x: s.fc(torch.cat([mean(F.relu(p)) for p in s.a(x).split([6, 10], 1)], 1)),
            a=conv(3, 16), fc=fc(16),
        ),
        {"a": 16},
    ),
    "a chunk into unequal parts": (
        lambda: Net(
            lambda s, x: s.fc(torch.cat([mean(F.relu(p)) for p in s.a(x).chunk(3, 1)], 1)), a=conv(3, 16), fc=fc(16)
        ),
        {"a": 10},
    ),
    "a pool that says where": (
        lambda: Net(lambda s, x: s.fc(F.adaptive_max_pool2d(s.a(x), 1).flatten(1)), a=conv(3, 8), fc=fc(8)),
        {"a": 8},
    ),
    "a depthwise convolution": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.dw(s.a(x)))), a=conv(3, 8), dw=conv(8, 8, 3, groups=8), fc=fc(8)
        ),
        {"a": 8},
    ),
    "a depthwise convolution with a multiplier": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.dw(s.a(x)))), a=conv(3, 8), dw=conv(8, 16, 3, groups=8), fc=fc(16)
        ),
        {"a": 8},
    ),
    "many groups go as wholes": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.g(s.a(x)))), a=conv(3, 16), g=conv(16, 32, 3, groups=8), fc=fc(32)
        ),
        {"a": 8},
    ),
    "few groups become narrower": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.g(s.a(x)))), a=conv(3, 16), g=conv(16, 32, 3, groups=2), fc=fc(32)
        ),
        {"a": 8, "g": 16},
    ),
    "squeeze and excite": (
        lambda: Net(
            lambda s, x: s.fc(mean((y := s.a(x)) * torch.sigmoid(s.up(F.relu(s.down(y.mean((2, 3), keepdim=True))))))),
            a=conv(3, 8), down=conv(8, 4), up=conv(4, 8), fc=fc(8),
        ),
        {"a": 8, "down": 4},
    ),
    "layer scale": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.a(x) + s.gamma * s.b(x))), **two(), gamma=nn.Parameter(torch.full((8, 1, 1), 1e-6))
        ),
        {"a": 8},
    ),
    "a batch norm": (
        lambda: Net(lambda s, x: s.fc(mean(F.relu(s.bn(s.a(x))))), a=conv(3, 8), bn=nn.BatchNorm2d(8), fc=fc(8)),
        {"a": 8},
    ),
    "a batch norm alone": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.bn(torch.cat([s.a(x), s.b(x)], 1)))),
            a=conv(3, 8), b=conv(3, 4), bn=nn.BatchNorm2d(12), fc=fc(12),
        ),
        {"a": 8, "b": 4},
    ),
    "a group norm with groups": (
        lambda: Net(lambda s, x: s.fc(mean(s.gn(s.a(x)))), a=conv(3, 12), gn=nn.GroupNorm(4, 12), fc=fc(12)),
        {"a": 4},
    ),
    "a group norm of one group": (
        lambda: Net(lambda s, x: s.fc(mean(s.gn(s.a(x)))), a=conv(3, 12), gn=nn.GroupNorm(1, 12), fc=fc(12)),
        {"a": 12},
    ),
    "an instance norm": (
        lambda: Net(
            lambda s, x: s.fc(mean(F.relu(s.norm(s.a(x))))),
            a=conv(3, 8), norm=nn.InstanceNorm2d(8, affine=True), fc=fc(8),
        ),
        {"a": 8},
    ),
    "a layer norm without parameters": (
        lambda: Net(
            lambda s, x: s.fc(s.norm(s.a(x).flatten(2).mT).mean(1)),
            a=conv(3, 8), norm=nn.LayerNorm(8, elementwise_affine=False), fc=fc(8),
        ),
        {"a": 8},
    ),
    "an RMS norm": (
        lambda: Net(lambda s, x: s.fc(s.norm(mean(s.a(x)))), a=conv(3, 8), norm=nn.RMSNorm(8), fc=fc(8)),
        {"a": 8},
    ),
    "flattened positions before a linear layer": (
        lambda: Net(lambda s, x: s.fc(F.max_pool2d(s.a(x), 2).flatten(1)), a=conv(3, 8), fc=fc(8 * 16)),
        {"a": 8},
    ),
    "patches merged into channels": (
        lambda: Net(
            lambda s, x: s.fc(
                mean(s.b(torch.cat([s.a(x)[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)))
            ),
            a=conv(3, 8), b=conv(32, 6), fc=fc(6),
        ),
        {"a": 8, "b": 6},
    ),
    "space to depth": (
        lambda: Net(lambda s, x: s.fc(mean(s.b(F.pixel_unshuffle(s.a(x), 2)))), a=conv(3, 8), b=conv(32, 6), fc=fc(6)),
        {"a": 8, "b": 6},
    ),
    "pixel shuffle": (
        lambda: Net(lambda s, x: s.fc(mean(F.pixel_shuffle(s.a(x), 2))), a=conv(3, 32), fc=fc(8)),
        {"a": 8},
    ),
    "unfold and fold": (
        lambda: Net(
            lambda s, x: s.fc(mean(F.fold(F.unfold(s.a(x), 3, padding=1), (8, 8), 3, padding=1))),
            a=conv(3, 8), fc=fc(8),
        ),
        {"a": 8},
    ),
    "a position table": (
        lambda: Net(
            lambda s, x: s.fc((s.a(x).flatten(2).mT + s.table).mean(1)),
            a=conv(3, 8), table=nn.Parameter(torch.randn(1, 64, 8)), fc=fc(8),
        ),
        {"a": 8},
    ),
    "a class token": (
        lambda: Net(
            lambda s, x: s.fc(
                torch.cat([s.token.expand(len(x), -1, -1), s.a(x).flatten(2).mT], 1).softmax(1)[:, 0]
            ),
            a=conv(3, 8), token=nn.Parameter(torch.randn(1, 1, 8)), fc=fc(8),
        ),
        {"a": 8},
    ),
    "a gate of one channel": (
        lambda: Net(
            lambda s, x: s.fc(mean((y := s.a(x)) * torch.sigmoid(s.gate(y)))), a=conv(3, 8), gate=conv(8, 1), fc=fc(8)
        ),
        {"a": 8},
    ),
    "a layer used twice": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.b(F.relu(s.b(s.a(x)))))), a=conv(3, 8), b=conv(8, 8), fc=fc(8)
        ),
        {"a": 8},
    ),
    "slopes of a PReLU": (
        lambda: Net(lambda s, x: s.fc(mean(s.act(s.a(x)))), a=conv(3, 8), act=nn.PReLU(8), fc=fc(8)),
        {"a": 8},
    ),
    "one slope for all": (
        lambda: Net(lambda s, x: s.fc(mean(s.act(s.a(x)))), a=conv(3, 8), act=nn.PReLU(), fc=fc(8)),
        {"a": 8},
    ),
    "padding": (
        lambda: Net(lambda s, x: s.fc(mean(F.relu(F.pad(s.a(x), (1, 2, 0, 1))))), a=conv(3, 8), fc=fc(8)),
        {"a": 8},
    ),
    "channels that are shuffled": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.b(s.a(x).reshape(len(x), 2, 8, 8, 8).transpose(1, 2).reshape(len(x), 16, 8, 8)))),
            a=conv(3, 16), b=conv(16, 6), fc=fc(6),
        ),
        {"a": 8, "b": 6},
    ),
    "windows that are rolled": (
        lambda: Net(
            lambda s, x: s.fc(
                s.b(
                    torch.roll(s.a(x).permute(0, 2, 3, 1), (-2, -2), (1, 2))
                    .view(len(x), 2, 4, 2, 4, 8).transpose(2, 3).reshape(-1, 16, 8)
                ).reshape(len(x), -1, 6).mean(1)
            ),
            a=conv(3, 8), b=nn.Linear(8, 6), fc=fc(6),
        ),
        {"a": 8, "b": 6},
    ),
    "a transposed convolution": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.t(s.a(x)))), a=conv(3, 8), t=nn.ConvTranspose2d(8, 6, 2, 2), fc=fc(6)
        ),
        {"a": 8, "t": 6},
    ),
    "a depthwise convolution after pixel shuffle": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.dw(F.pixel_shuffle(s.a(x), 2)))),
            a=conv(3, 32), dw=conv(8, 8, 3, groups=8), fc=fc(8),
        ),
        {"a": 8},
    ),
    "a norm over channels": (
        lambda: Net(lambda s, x: s.fc(F.normalize(mean(s.a(x)), dim=1)), a=conv(3, 8), fc=fc(8)),
        {"a": 8},
    ),
    "selective kernels": (
        lambda: Net(
            lambda s, x: s.fc(
                mean((torch.stack([s.a(x), s.b(x)], 1) * s.gate(x).mean((2, 3)).view(-1, 2, 8, 1, 1).softmax(1)).sum(1))
            ),
            **two(), gate=conv(3, 16),
        ),
        {"a": 8},
    ),
    "a weight used as a matrix": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.a(x)) @ s.matrix), a=conv(3, 8), matrix=nn.Parameter(torch.randn(8, 6)), fc=fc(6)
        ),
        {"a": 8, "matrix": 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNED)
def test_groups_are_found_and_proven(name: str) -> None:
    torch.manual_seed(0)
    make, expected = PRUNED[name]
    net = make().eval()
    analysis = analysed(net)
    assert free(analysis) == expected
    random = np.random.default_rng(1)
    keep = {group.name: random.permutation(group.size) < group.size // 2 for group in analysis.groups}
    assert check(net, analysis, keep, torch.randn(2, 3, 8, 8)) < 1e-5


STANDARDISED = "computed weight"
FROZEN: dict[str, tuple[Callable[[], nn.Module], dict[str, int], dict[str, str]]] = {
    "an operator without a rule": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.c(torch.cumsum(s.b(F.relu(s.a(x))), 1)))),
            a=conv(3, 8), b=conv(8, 6), c=conv(6, 4), fc=fc(4),
        ),
        {"a": 8, "c": 4},
        {"b": "cumsum"},
    ),
    "a standardised weight": (
        lambda: Net(
            lambda s, x: s.fc(
                mean(s.b(F.conv2d(F.relu(s.a(x)), standardised(s.w))))
            ),
            a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8, 1, 1)), b=conv(6, 4), fc=fc(4),
        ),
        {"b": 4},
        {"a": STANDARDISED},
    ),
    "a convolution over channels": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.b((y := s.a(x)) * torch.sigmoid(s.eca(mean(y)[:, None]))[:, 0, :, None, None]))),
            a=conv(3, 8), eca=nn.Conv1d(1, 1, 3, padding=1), b=conv(8, 4), fc=fc(4),
        ),
        {"b": 4},
        {"a": "slides over channels"},
    ),
    "a constant for every channel": (
        lambda: Net(
            lambda s, x: s.fc(mean(s.b(s.a(x) * torch.arange(8.0).view(8, 1, 1)))), a=conv(3, 8), b=conv(8, 4), fc=fc(4)
        ),
        {"b": 4},
        {"a": "combines it with a constant"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_be_followed_stays_and_is_named(name: str) -> None:
    torch.manual_seed(0)
    make, expected, why = FROZEN[name]
    analysis = analysed(make().eval())
    assert free(analysis) == expected
    found = reasons(analysis)
    for group, words in why.items():
        assert words in found[group]


def test_the_output_stays() -> None:
    analysis = analysed(Net(lambda s, x: s.fc(mean(s.a(x))), a=conv(3, 8), fc=fc(8)).eval())
    assert reasons(analysis) == {"fc": "it is the network's output"}


def test_code_that_counts_channels_in_a_hidden_way_is_refused_not_believed() -> None:
    net = Net(
        lambda s, x: s.fc(mean(s.b(s.a(x)[:, list(range(8))]))), a=conv(3, 8), b=conv(8, 4), fc=fc(4)
    ).eval()
    analysis = analysed(net)
    assert free(analysis) == {"b": 4}
    assert "does not run without it" in reasons(analysis)["a"] or "constant" in reasons(analysis)["a"]
