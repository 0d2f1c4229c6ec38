"""Histograms are exact whatever the order; every method's range is what its definition says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cveff.compress.quant.fake_quant import FakeQuantize, Grid
from cveff.compress.quant.ranges import BINS, Histogram, Watch, drift, find_range, rounding_off, weight_range
from cveff.errors import StepError

UNSIGNED = Grid(8)
SYMMETRIC = Grid(8, signed=True, symmetric=True)


def histogram(*batches: torch.Tensor) -> Histogram:
    found = Histogram()
    for batch in batches:
        found.add(batch)
    return found


def test_counts_do_not_depend_on_the_order_of_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1000, generator=generator) * scale for scale in (0.01, 1.0, 30.0)]
    first, second = histogram(*batches), histogram(*batches[::-1])
    assert first.width == second.width
    assert (
        (first.low, first.high)
        == (second.low, second.high)
        == (
            float(torch.cat(batches).min()),
            float(torch.cat(batches).max()),
        )
    )
    assert np.array_equal(first.counts, second.counts)
    assert first.counts.sum() == 3000
    exact, _ = np.histogram(torch.cat(batches).numpy(), 2 * BINS, (-BINS * first.width, BINS * first.width))
    assert np.array_equal(first.counts, exact)


def test_at_least_half_of_a_side_is_in_use() -> None:
    for reach in (1e-6, 0.3, 5.0, 1e5):
        found = histogram(torch.tensor([0.0, reach]))
        assert BINS / 2 * found.width <= reach <= BINS * found.width


def test_constant_tensors_have_a_range() -> None:
    zeros = histogram(torch.zeros(10))
    fives = histogram(torch.full((10,), 5.0))
    for method in ("minmax", "moving-average", "percentile", "mse", "entropy"):
        assert find_range(zeros, UNSIGNED, method) == (0.0, 0.0)
        low, high = find_range(fives, UNSIGNED, method)
        assert low == 0.0 and high == pytest.approx(5.0, rel=2e-3)


def test_minmax_and_moving_average() -> None:
    found = histogram(torch.tensor([-1.0, 4.0]), torch.tensor([-3.0, 2.0]))
    assert find_range(found, UNSIGNED, "minmax") == (-3.0, 4.0)
    assert find_range(found, UNSIGNED, "moving-average") == (-2.0, 3.0)


def test_the_percentile_leaves_the_rarest_out() -> None:
    values = torch.cat([torch.linspace(0, 1, 1_000_000), torch.full((3,), 100.0)])
    low, high = find_range(histogram(values), UNSIGNED, "percentile")
    assert low == 0.0 and high == pytest.approx(1.0, abs=0.1)


def test_mse_is_the_best_of_a_fine_search() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator) ** 3  # long tails
    low, high = find_range(histogram(values), SYMMETRIC, "mse")

    def error(reach: float) -> float:
        step = reach / 127
        return float(((values / step).round().clamp(-128, 127) * step - values).square().mean())

    assert low == -high
    reach = float(values.abs().max())
    best = min(error(reach * share) for share in np.linspace(0.05, 1, 200))
    assert error(high) <= 1.02 * max(best, error(0.2 * reach) if high <= 0.21 * reach else 0)


def test_entropy_cuts_a_tail_that_is_all_but_empty() -> None:
    values = torch.cat([torch.linspace(0, 1, 100_000), torch.tensor([50.0])])
    _, high = find_range(histogram(values), UNSIGNED, "entropy")
    assert high < 25


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(StepError, match="'guess' is unknown; use one of minmax"):
        find_range(histogram(torch.ones(3)), UNSIGNED, "guess")  # type: ignore[arg-type]


def test_weights_have_a_range_a_channel() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.1], [0.0, 0.0]])
    low, high = weight_range(weight, 0, Grid(8, signed=True, symmetric=True, narrow=True))
    assert high.tolist() == [2.0, 0.5, 0.0] and torch.equal(low, -high)
    by_column = weight_range(weight, 1, Grid(8, signed=True, symmetric=True, narrow=True))[1]
    assert by_column.tolist() == [1.0, 2.0]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 500, generator=generator) ** 3
    grid = Grid(4, signed=True, symmetric=True, narrow=True)
    errors = []
    for method in ("minmax", "mse"):
        scale, _ = grid.steps(*weight_range(weight, 0, grid, method))  # type: ignore[arg-type]
        step = scale[:, None]
        errors.append(((weight / step).round().clamp(grid.low, grid.high) * step - weight).square().sum(1))
    assert bool((errors[1] < 0.95 * errors[0]).all())


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rounding = FakeQuantize(UNSIGNED)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rounding(x.log())


def test_watching_sees_the_unrounded_network_and_names_what_overflows() -> None:
    net = _Net()
    watch = Watch(net, {"here": net.rounding})
    watch.see([torch.ones(2, 3, 4, 4) * 2])
    assert watch.histograms["here"].high == pytest.approx(0.6931, abs=1e-4)
    assert net.rounding.enabled and not net.rounding._forward_pre_hooks
    with pytest.raises(StepError, match="here holds NaN or infinity"):
        watch.see([torch.zeros(1, 3, 4, 4)])
    assert net.rounding.enabled and not net.rounding._forward_pre_hooks


def test_rounding_can_be_off_in_parts() -> None:
    parts = nn.ModuleList([FakeQuantize(UNSIGNED), FakeQuantize(UNSIGNED)])
    with rounding_off(parts, [parts[0]]):
        assert [part.enabled for part in parts] == [False, True]
    assert all(part.enabled for part in parts)


def test_drift_is_relative_to_the_width_and_names_the_worst() -> None:
    before = {"a": (0.0, 1.0), "b": (-1.0, 1.0)}
    assert drift(before, before) == (0.0, "")
    assert drift(before, {"a": (0.0, 1.25), "b": (-1.1, 1.0)}) == (pytest.approx(0.2), "a")
