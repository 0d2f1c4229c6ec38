"""Bases: orthonormal, the SVD's own or nearly as good, and compared without regard to sign and order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cveff.train.projector import find_bases, overlap, project, project_back, sides_of


def gradient(rows: int, columns: int, decay: float = 0.03, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall as exp(-decay · i)."""
    random = torch.Generator().manual_seed(seed)
    short = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, short, generator=random)).Q
    right = torch.linalg.qr(torch.randn(columns, short, generator=random)).Q
    return left * torch.exp(-decay * torch.arange(short)) @ right.t()


@pytest.mark.parametrize("method", ["svd", "subspace"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)], ids=str)
def test_bases_are_orthonormal_and_contiguous(shape: tuple[int, int], method: str) -> None:
    bases = find_bases(gradient(*shape), 8, ("left", "right"), method)
    assert bases["left"].shape == (shape[0], 8) and bases["right"].shape == (8, shape[1])
    for basis in (bases["left"].t(), bases["right"]):
        torch.testing.assert_close(basis @ basis.t(), torch.eye(8), rtol=0, atol=1e-5)
    assert all(basis.untyped_storage().nbytes() == basis.nbytes for basis in bases.values())


@pytest.mark.parametrize("decay", [0.1, 0.01, 0.0], ids=["steep", "flat", "none"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_subspace_iteration_captures_what_the_svd_does(side: str, decay: float) -> None:
    matrix = gradient(300, 200, decay)
    energies = []
    for method in ("svd", "subspace"):
        bases = find_bases(matrix, 50, (side,), method)
        energies.append(float(project(matrix, bases).square().sum()))
    assert energies[1] >= 0.99 * energies[0]


def test_a_warm_start_follows_a_gradient_that_moves() -> None:
    before, now = gradient(300, 200, 0.01), gradient(300, 200, 0.01) + 0.01 * gradient(300, 200, 0.0, seed=1)
    best = find_bases(now, 20, ("right",), "svd")
    old = find_bases(before, 20, ("right",), "svd")
    cold = find_bases(now, 20, ("right",), "subspace")
    warm = find_bases(now, 20, ("right",), "subspace", old)
    assert overlap(best, warm) > overlap(best, cold)


def test_auto_is_exact_up_to_512() -> None:
    small, large = gradient(600, 512), gradient(600, 514)
    for matrix, method in ((small, "svd"), (large, "subspace")):
        expected = find_bases(matrix, 4, ("right",), method)["right"]
        assert torch.equal(find_bases(matrix, 4, ("right",))["right"], expected)


def test_the_same_seed_gives_the_same_basis() -> None:
    matrix = gradient(90, 70, 0.0)
    first, again, other = (find_bases(matrix, 4, ("left",), "subspace", seed=s)["left"] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_a_matrix_of_low_rank_comes_back_whole(proj_type: str) -> None:
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(20, 3, generator=random) @ torch.randn(3, 12, generator=random)
    bases = find_bases(matrix, 3, sides_of(proj_type, 20, 12))
    torch.testing.assert_close(project_back(project(matrix, bases), bases), matrix, rtol=1e-4, atol=1e-5)


def test_overlap_ignores_signs_and_order() -> None:
    bases = find_bases(gradient(40, 30), 6, ("left", "right"))
    turned = {"left": -bases["left"].flip(1), "right": bases["right"].flip(0)}
    assert overlap(bases, turned) == pytest.approx(1)
    whole = find_bases(gradient(40, 30), 12, ("right",))["right"]
    assert overlap({"right": whole[:6]}, {"right": whole[6:]}) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    matrix = gradient(40, 30).to(dtype)
    basis = find_bases(matrix, 5, ("right",))["right"]
    assert basis.dtype == dtype
    assert torch.equal(basis, find_bases(matrix.float(), 5, ("right",))["right"].to(dtype))
