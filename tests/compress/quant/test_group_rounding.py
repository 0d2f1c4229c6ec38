"""Compensated rounding against brute force, and what it gains where inputs are correlated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cveff.compress.quant.group_rounding import (
    DAMPING,
    find_scale,
    output_error,
    round_compensated,
    round_nearest,
)
from cveff.compress.quant.packed_linear import WeightGrid
from cveff.errors import StepError


def correlated(inputs: int, samples: int = 512, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.1, 2, inputs, dtype=torch.float64)
    return torch.randn(samples, inputs, generator=generator, dtype=torch.float64) @ mixing * scale


def brute_force(weight: Tensor, moments: Tensor, grid: WeightGrid, order: list[list[int]]) -> Tensor:
    """One column after the other; after each, the columns left are solved for by least squares, from scratch."""
    inputs = weight.shape[1]
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    integers = torch.zeros_like(weight)
    current, fixed = weight.clone(), []
    columns = [column for group in order for column in group]
    for group in order:
        size = len(group)
        # The loss of rounding a column is its squared error over this, when the columns after it make up for it.
        importance = []
        for column in group:
            left = columns[columns.index(column) :]
            importance.append(1 / torch.linalg.inv(damped[left][:, left])[0, 0])
        scale, zero = find_scale(current[:, group], grid, torch.stack(importance))
        assert scale.shape == (len(weight), 1) and size
        for column in group:
            whole = ((current[:, [column]] / scale).round() + zero).clamp(0, grid.high)
            integers[:, [column]] = whole
            current[:, [column]] = (whole - zero) * scale
            fixed.append(column)
            left = [other for other in range(inputs) if other not in fixed]
            if left:
                lost = (current - weight)[:, fixed]
                # argmin over δ of (lost, δ) H (lost, δ)ᵀ.
                move = -torch.linalg.solve(damped[left][:, left], damped[left][:, fixed] @ lost.T).T
                current[:, left] = weight[:, left] + move
    return integers


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("inputs", [7, 40])
def test_is_the_same_as_solving_for_the_columns_left_each_time(
    inputs: int, ordered: bool, bits: int, symmetric: bool
) -> None:
    grid = WeightGrid(bits, 32, symmetric)
    x = correlated(inputs)
    moments = x.T @ x / len(x)
    weight = torch.randn(3, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = [list(range(start, min(start + 32, inputs))) for start in range(0, inputs, 32)]
    if ordered:
        energy = moments.diagonal()
        groups = [sorted(group, key=lambda column: -float(energy[column])) for group in groups]
        groups.sort(key=lambda group: -float(energy[group].mean()))
    expected = brute_force(weight, moments, grid, groups)
    found = round_compensated(weight, moments, grid, ordered=ordered)
    assert torch.equal(found.integers, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_outputs_are_closer_than_by_nearest_on_correlated_inputs(bits: int, symmetric: bool) -> None:
    grid = WeightGrid(bits, 32, symmetric)
    x, unseen = correlated(96, 2048).split(1024)
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = {}
    for name, rounded in (
        ("nearest", round_nearest(weight, grid)),
        ("compensated", round_compensated(weight, x.T @ x, grid)),
    ):
        errors[name] = output_error(weight, rounded.weight(32), unseen.T @ unseen)
    assert errors["compensated"] < 0.6 * errors["nearest"]


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    grid = WeightGrid(4, 32)
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    nearest, compensated = round_nearest(weight, grid), round_compensated(weight, torch.eye(64), grid)
    assert torch.equal(nearest.integers, compensated.integers)
    assert torch.equal(nearest.scales, compensated.scales)


@pytest.mark.parametrize("symmetric", [False, True])
def test_searched_scales_are_never_worse_than_the_full_range(symmetric: bool) -> None:
    values = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = WeightGrid(4, 32, symmetric)
    weight = torch.rand(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(search: bool) -> Tensor:
        scale, zero = find_scale(values, grid, weight, search=search)
        whole = ((values / scale).round() + zero).clamp(0, 15)
        return (((whole - zero) * scale - values).square() * weight).sum(1)

    assert (loss(True) <= loss(False)).all() and loss(True).sum() < 0.95 * loss(False).sum()


def test_covering_the_range_loses_at_most_half_a_step() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for bits in (4, 8):
        rounded = round_nearest(weight, WeightGrid(bits, 32), search=False)
        steps = rounded.scales.repeat_interleave(32, 1)
        assert ((rounded.weight(32) - weight).abs() <= 0.5 * steps * (1 + 1e-6)).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_stay_zeros(symmetric: bool) -> None:
    grid = WeightGrid(4, 32, symmetric)
    x = correlated(64)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[:, ::3] = 0
    weight[2, :32] = 0  # a whole group
    for rounded in (round_nearest(weight, grid), round_compensated(weight, x.T @ x, grid)):
        assert (rounded.weight(32)[weight == 0] == 0).all()
        assert rounded.scales.isfinite().all() and (rounded.scales != 0).all()


def test_inputs_never_seen_are_rounded_to_the_nearest() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = round_compensated(weight, torch.zeros(32, 32), WeightGrid(4, 32))
    assert torch.equal(rounded.integers, round_nearest(weight, WeightGrid(4, 32)).integers)


def test_a_matrix_that_is_no_second_moment_is_refused() -> None:
    with pytest.raises(StepError, match="not positive definite"):
        round_compensated(torch.ones(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), WeightGrid())
