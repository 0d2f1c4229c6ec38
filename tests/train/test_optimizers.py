"""Optimizers, schedules and the moving average against their definitions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cveff.train.ema import MovingAverage
from cveff.train.optimizers import MatrixMuon, build_optimizer
from cveff.train.schedule import learning_rate_factor
from cveff.train.state import load_state, save_state


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2)
    )


def step(module: nn.Module, optimizer: object) -> None:
    optimizer.zero_grad()
    module(torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "galore"])
def test_every_parameter_is_updated_once_and_norms_do_not_decay(name: str) -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    optimizer = build_optimizer(module, name, 0.01, 0.1, 0.9)
    step(module, optimizer)
    for parameter_name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[parameter_name]), parameter_name
    if name != "muon":
        decays = {group["weight_decay"] for inner in optimizer.optimizers for group in inner.param_groups}
        assert decays == {0.1, 0.0}


def test_muon_on_a_convolution_equals_torchs_muon_on_its_matrix() -> None:
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().reshape(8, 36).clone())
    gradient = torch.randn(8, 4, 3, 3)
    kernel.grad, matrix.grad = gradient.clone(), gradient.reshape(8, 36).clone()
    MatrixMuon([kernel], lr=0.02, momentum=0.9, weight_decay=0.01).step()
    torch.optim.Muon([matrix], lr=0.02, momentum=0.9, weight_decay=0.01, adjust_lr_fn="original").step()
    assert torch.equal(kernel.reshape(8, 36), matrix)


def test_muon_does_not_depend_on_the_memory_format() -> None:
    kernel = torch.randn(8, 4, 3, 3)
    gradient = torch.randn(8, 4, 3, 3)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(kernel.clone(memory_format=memory_format))
        parameter.grad = gradient.clone(memory_format=memory_format)
        MatrixMuon([parameter], lr=0.02, momentum=0.0, weight_decay=0.0).step()
        results.append(parameter.detach().contiguous())
    # The iteration runs in bfloat16 on permuted columns: equal up to its rounding.
    torch.testing.assert_close(results[0], results[1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "galore"])
def test_optimizer_state_survives_a_file(name: str, tmp_path) -> None:
    module = network().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(module, name, 0.01, 0.1, 0.9)
    step(module, optimizer)
    other = copy.deepcopy(module)
    save_state(tmp_path / "state", {"optimizer": optimizer.state_dict()})
    resumed = build_optimizer(other, name, 0.01, 0.1, 0.9)
    resumed.load_state_dict(load_state(tmp_path / "state")["optimizer"])
    for _ in range(2):
        step(module, optimizer)
        step(other, resumed)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "triangular"])
def test_schedules_rise_to_their_peak_and_fall_towards_zero(schedule: str) -> None:
    factors = [learning_rate_factor(schedule, step, 1000, 100) for step in range(1000)]
    peak = factors.index(max(factors))
    assert max(factors) == pytest.approx(1.0, abs=1e-2)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0 <= factors[-1] < 0.01
    assert 0 < factors[0] < 0.05


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    assert [learning_rate_factor("constant", step, 10, 2) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_moving_average_is_its_recurrence() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = MovingAverage(module, 0.5)
    expected = module[0].weight.detach().clone()
    for number in range(1, 6):
        with torch.no_grad():
            module[0].weight.add_(1.0)
            module[1].num_batches_tracked.add_(1)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * module[0].weight.detach()
        average.update(module, number)
    torch.testing.assert_close(average.module[0].weight, expected)
    assert average.module[1].num_batches_tracked == 5
