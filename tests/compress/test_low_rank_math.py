"""Low-rank factors: exact at full rank, optimal under the data's covariance, errors as the formula says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cveff.compress import low_rank_math as math

ORDERS = ("vertical", "horizontal")


def patches_of(kernel: tuple[int, int], channels: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth correlated pictures, their centred patches (N, in·h·w) and the patches' covariance."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(16, 4, 14, 14, generator=generator, dtype=torch.float64)
    mix = torch.randn(channels, 4, generator=generator, dtype=torch.float64)
    images = torch.einsum("dc,bcyx->bdyx", mix, F.avg_pool2d(noise, 3, 1)) + 1.5
    images = images + 0.1 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
    patches = F.unfold(images, kernel).transpose(1, 2).flatten(0, 1)
    centred = patches - patches.mean(0)
    return images, centred, centred.T @ centred / len(centred)


def weight_of(out: int, channels: int, height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, channels, height, width, generator=generator, dtype=torch.float64)


def split(weight: Tensor, rank: int, order: str, covariance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A spatial split at one rank, made as one of several, whose formula for the error is checked."""
    height, width = weight.shape[2:] if order == "vertical" else weight.shape[:1:-1]
    largest = min(weight.shape[0] * width, weight.shape[1] * height)
    every = math.SpatialSplit(weight, order, largest, covariance)
    factors = every.factors(rank)
    expected = math.relative_error(weight, math.compose(factors), covariance)
    assert every.error(rank) == pytest.approx(expected, abs=1e-9)
    return factors


def measured(weight: Tensor, approximation: Tensor, patches: Tensor) -> float:
    """The output error on the patches themselves."""
    expected, found = (patches @ kernel.flatten(1).T for kernel in (weight, approximation))
    return float((expected - found).square().sum() / expected.square().sum())


@pytest.mark.parametrize("shape", [(12, 5, 1, 1), (5, 12, 1, 1), (8, 6, 3, 3), (4, 6, 3, 5)])
@pytest.mark.parametrize("whiten", [False, True])
def test_full_rank_is_the_same_function(shape: tuple[int, int, int, int], whiten: bool) -> None:
    weight = weight_of(*shape)
    covariance = patches_of(shape[2:], shape[1])[2] if whiten else None
    out, channels, height, width = shape
    made = [
        math.svd_factors(
            weight, math.output_basis(weight.flatten(1), covariance), min(out, channels * height * width)
        ),
        math.tucker_factors(weight, (channels, out), covariance),
        split(weight, min(out * width, channels * height), "vertical", covariance),
        split(weight, min(out * height, channels * width), "horizontal", covariance),
    ]
    for factors in made:
        assert torch.allclose(math.compose(factors), weight, rtol=0, atol=1e-6 * float(weight.abs().max()))


@pytest.mark.parametrize("shape", [(12, 5, 1, 1), (5, 12, 1, 1), (8, 6, 3, 3)])
@pytest.mark.parametrize("whiten", [False, True])
def test_dropped_energy_is_the_measured_error_at_every_rank(
    shape: tuple[int, int, int, int], whiten: bool
) -> None:
    weight = weight_of(*shape)
    _, patches, covariance = patches_of(shape[2:], shape[1])
    basis = math.output_basis(weight.flatten(1), covariance if whiten else None)
    energy = math.dropped_energy(weight.flatten(1), basis, covariance)
    assert energy[0] == 1 and energy[-1] < 1e-9
    assert (energy.diff() <= 1e-12).all()
    for rank in range(1, basis.shape[1] + 1):
        approximation = math.compose(math.svd_factors(weight, basis, rank))
        assert measured(weight, approximation, patches) == pytest.approx(float(energy[rank]), abs=1e-9)
        assert math.relative_error(weight, approximation, covariance) == pytest.approx(
            float(energy[rank]), abs=1e-9
        )


@pytest.mark.parametrize("shape", [(12, 5, 1, 1), (5, 12, 1, 1), (8, 6, 3, 3)])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
def test_whitened_is_never_worse_than_plain_and_better_on_anisotropic_data(
    shape: tuple[int, int, int, int], damping: float
) -> None:
    weight = weight_of(*shape)
    covariance = patches_of(shape[2:], shape[1])[2]
    matrix = weight.flatten(1)
    plain = math.dropped_energy(matrix, math.output_basis(matrix), covariance)
    whitened = math.dropped_energy(matrix, math.output_basis(matrix, covariance, damping), covariance)
    assert (whitened <= plain + 1e-9).all()
    assert whitened[2] < 0.95 * plain[2]


def test_white_data_needs_no_whitening() -> None:
    matrix = weight_of(7, 9, 1, 1).flatten(1)
    basis, white = math.output_basis(matrix), math.output_basis(matrix, torch.eye(9))
    assert torch.allclose(basis[:, :3] @ basis[:, :3].T, white[:, :3] @ white[:, :3].T, atol=1e-9)
    values = torch.linalg.svdvals(matrix).square()
    assert torch.allclose(math.dropped_energy(matrix, basis)[3], values[3:].sum() / values.sum())


def test_data_in_a_subspace_is_reproduced_by_its_dimension() -> None:
    """A covariance of rank 3 is singular; three directions are then enough, and full rank stays exact."""
    weight = weight_of(8, 10, 1, 1)
    points = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 10, dtype=torch.float64)
    covariance = points.T @ points / 50
    basis = math.output_basis(weight.flatten(1), covariance, damping=0.0)
    assert math.dropped_energy(weight.flatten(1), basis, covariance)[3] < 1e-9
    whole = math.compose(math.svd_factors(weight, basis, 8))
    assert torch.allclose(whole, weight, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_spatial_split_gets_better_with_rank_and_with_whitening(order: str) -> None:
    weight = weight_of(8, 6, 3, 3)
    _, patches, covariance = patches_of((3, 3), 6)
    errors, plain = [], []
    for rank in (2, 4, 8, 12, 18):
        approximation = math.compose(split(weight, rank, order, covariance))
        errors.append(math.relative_error(weight, approximation, covariance))
        assert errors[-1] == pytest.approx(measured(weight, approximation, patches), abs=1e-9)
        other = math.compose(split(weight, rank, order))
        plain.append(math.relative_error(weight, other, covariance))
    assert errors == sorted(errors, reverse=True)
    assert all(ours <= theirs + 1e-9 for ours, theirs in zip(errors, plain, strict=True))
    assert errors[1] < 0.8 * plain[1]


@pytest.mark.parametrize("order", ORDERS)
def test_a_separable_kernel_needs_rank_one_a_channel(order: str) -> None:
    column, row = torch.randn(5, 1), torch.randn(1, 3)
    weight = (column @ row)[None, None].double() * weight_of(4, 1, 1, 1)
    factors = split(weight, 1, order)
    assert torch.allclose(math.compose(factors), weight, atol=1e-9)
    first, last = factors
    assert first.shape[2:] == ((5, 1) if order == "vertical" else (1, 3))
    assert last.shape[2:] == ((1, 3) if order == "vertical" else (5, 1))


def test_tucker_finds_a_tensor_of_low_rank_and_whitening_helps() -> None:
    core = weight_of(3, 2, 3, 3)
    weight = torch.einsum("or,rsyx,cs->ocyx", torch.randn(8, 3).double(), core, torch.randn(6, 2).double())
    assert torch.allclose(math.compose(math.tucker_factors(weight, (2, 3))), weight, atol=1e-9)
    weight = weight_of(8, 6, 3, 3)
    covariance = patches_of((3, 3), 6)[2]
    errors = [
        math.relative_error(weight, math.compose(math.tucker_factors(weight, (3, 4), given)), covariance)
        for given in (None, covariance)
    ]
    assert errors[1] < errors[0]


def test_factors_are_balanced() -> None:
    weight = 100 * weight_of(12, 5, 1, 1)
    first, last = math.svd_factors(weight, math.output_basis(weight.flatten(1)), 3)
    assert torch.allclose(first.flatten(1).norm(dim=1), last.flatten(1).norm(dim=0))


def test_the_bias_keeps_the_mean_exactly() -> None:
    weight, bias = weight_of(8, 6, 3, 3), torch.randn(8)
    images = patches_of((3, 3), 6)[0]
    mean = F.unfold(images, 3).mean((0, 2))
    approximation = math.compose(math.tucker_factors(weight, (2, 2)))
    corrected = math.corrected_bias(weight, approximation, bias, mean)
    expected, found = F.conv2d(images, weight, bias.double()), F.conv2d(images, approximation, corrected)
    assert torch.allclose(expected.mean((0, 2, 3)), found.mean((0, 2, 3)), atol=1e-9)
    assert torch.equal(math.corrected_bias(weight, approximation, bias, None), bias.double())


def test_dead_layers_and_dead_inputs_do_no_harm() -> None:
    zero = torch.zeros(4, 6, 1, 1)
    basis = math.output_basis(zero.flatten(1), torch.eye(6))
    assert math.dropped_energy(zero.flatten(1), basis, torch.eye(6)).sum() == 0
    weight, nothing = weight_of(4, 6, 3, 3), torch.zeros(54, 54)
    for factors in (
        math.svd_factors(weight, math.output_basis(weight.flatten(1), nothing), 4),
        split(weight, 12, "vertical", nothing),
        math.tucker_factors(weight, (6, 4), nothing),
    ):
        assert math.compose(factors).isfinite().all()
    assert math.relative_error(weight, weight * 0, nothing) == 0


def test_compose_is_what_the_chain_computes() -> None:
    x = torch.randn(1, 6, 9, 9, dtype=torch.float64)
    for factors in (
        math.tucker_factors(weight_of(8, 6, 3, 3), (3, 4)),
        split(weight_of(8, 6, 3, 5), 4, "horizontal"),
    ):
        out = x
        for factor in factors:
            out = F.conv2d(out, factor)
        assert torch.allclose(out, F.conv2d(x, math.compose(factors)), atol=1e-9)
