"""The oracle itself: it equals masking where that is simple, and a wrong cut does not pass it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cveff.compress.analysis import analyze, check
from cveff.compress.groups import Analysis
from cveff.compress.oracle import zeroed
from cveff.compress.proof import Proof, awakened
from cveff.compress.prune_channels import PruneChannels
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 5),
    ).eval()


@pytest.fixture(scope="module")
def analysis(net: nn.Module) -> Analysis:
    return analyze(net, SPEC)


def test_it_equals_multiplying_channels_with_zero(net: nn.Module, analysis: Analysis) -> None:
    keep = {"0": np.arange(8) % 2 == 0, "3": np.arange(6) < 4}
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        x = net[2](net[1](net[0](images))) * torch.from_numpy(keep["0"])[:, None, None]
        x = net[4](net[3](x)) * torch.from_numpy(keep["3"])[:, None, None]
        expected = net[6](net[5](x))
    assert torch.allclose(zeroed(analysis, keep, images), expected, atol=1e-6)


def test_keeping_everything_is_the_dense_network(net: nn.Module, analysis: Analysis) -> None:
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(zeroed(analysis, {}, images), torch.cat([net(image[None]) for image in images]))
    edit = analysis.edit({}, net)
    assert edit == PruneChannels({}, {}, {})


def test_it_reads_the_weights_it_is_given(net: nn.Module, analysis: Analysis) -> None:
    other = awakened(net, seed=3)
    keep = {"0": np.arange(8) < 3}
    assert check(other, analysis, keep, torch.randn(1, 3, 8, 8)) < 1e-5
    assert not torch.equal(
        zeroed(analysis, keep, (x := torch.randn(1, 3, 8, 8))), zeroed(analysis, keep, x, other)
    )


@pytest.mark.parametrize("what", ["another channel", "one side only", "not the flattened positions"])
def test_a_wrong_edit_does_not_pass(
    what: str, net: nn.Module, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = {"0": np.arange(8) < 4, "3": np.arange(6) < 3}
    right = analysis.edit(keep, net)
    slices = {path: dict(dims) for path, dims in right.keep.items()}
    if what == "another channel":
        slices["0.weight"]["0"] = [0, 1, 2, 4]
    elif what == "one side only":
        slices["3.weight"]["1"] = [4, 5, 6, 7]
    else:
        slices["6.weight"]["1"] = list(range(0, 96, 2))
    monkeypatch.setattr(Analysis, "edit", lambda *_: replace(right, keep=slices))
    assert check(net, analysis, keep, torch.randn(1, 3, 8, 8)) > 1e-2
    trial = Proof(net, analysis, torch.randn(1, 3, 8, 8)).verdict(keep)
    assert "differs from the dense one" in trial.reason


def test_the_groups_at_fault_are_singled_out(
    net: nn.Module, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Analysis.edit

    def wrong(self: Analysis, keep: dict[str, np.ndarray], module: nn.Module) -> PruneChannels:
        edit = right(self, keep, module)
        slices = {path: dict(dims) for path, dims in edit.keep.items()}
        if "3.weight" in slices and "0" in slices["3.weight"]:
            slices["3.weight"]["0"] = [index + 1 for index in slices["3.weight"]["0"]]
        return replace(edit, keep=slices)

    monkeypatch.setattr(Analysis, "edit", wrong)
    keep = {"0": np.arange(8) < 4, "3": np.arange(6) < 3}
    assert set(Proof(net, analysis, torch.randn(1, 3, 8, 8)).failing(keep)) == {"3"}


def test_values_that_are_not_finite_prove_nothing(net: nn.Module, analysis: Analysis) -> None:
    broken = awakened(net, seed=0)
    broken[3].weight = nn.Parameter(torch.full_like(broken[3].weight, torch.nan))
    assert check(broken, analysis, {"0": np.arange(8) < 4}, torch.randn(1, 3, 8, 8)) == float("inf")


def test_an_awakened_network_hears_every_weight() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 5))
    nn.init.zeros_(net[1].weight)
    nn.init.normal_(net[3].weight, std=1e-5)
    awake = awakened(net, seed=0)
    assert torch.equal(net[1].weight, torch.zeros(8)) and not awake.training  # the network is as it was
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    awake(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 1e-3 for parameter in awake.parameters())


def test_shared_weights_stay_shared_when_awakened() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    first.weight = second.weight = layer.weight
    awake = awakened(nn.Sequential(first, second), seed=0)
    assert awake[0].weight is awake[1].weight and awake[0].weight.abs().max() > 0
