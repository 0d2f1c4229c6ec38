"""The low-rank bases of GaLore (Zhao et al., arXiv:2403.03507, section 3): found, applied, taken back.

A left basis is U (m, r) with orthonormal columns, a right basis V (r, n) with orthonormal rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

ProjType = Literal["std", "reverse_std", "left", "right", "full"]
Method = Literal["auto", "svd", "subspace"]
Side = Literal["left", "right"]

EXACT_SIDE = 512
"""Longest short side of a matrix whose singular vectors "auto" finds exactly."""
_OVERSAMPLING = 8
_POWER_STEPS = 8
_CONVERGED = 0.002


def sides_of(proj_type: ProjType, rows: int, columns: int) -> tuple[Side, ...]:
    """From where a (rows, columns) gradient is projected: "std" keeps its long side, "reverse_std" its short one."""
    if proj_type == "full":
        return ("left", "right")
    if proj_type == "std":
        return ("right",) if rows >= columns else ("left",)
    if proj_type == "reverse_std":
        return ("left",) if rows >= columns else ("right",)
    return (proj_type,)


def find_bases(
    matrix: Tensor,
    rank: int,
    sides: Sequence[Side],
    method: Method = "auto",
    previous: Mapping[Side, Tensor] | None = None,
    seed: int = 0,
) -> dict[Side, Tensor]:
    """The first `rank` singular vectors of `matrix`, on the sides asked for.

    Args:
        matrix: (m, n), finite; computed in float32 whatever its dtype.
        method: "svd" is exact; "subspace" is randomised subspace iteration (Halko, Martinsson & Tropp,
            arXiv:0909.4061, algorithm 4.4) until the captured energy grows by less than 0.2%, with a Rayleigh-Ritz
            step at its end; "auto" is exact up to a short side of 512.
        previous: bases that subspace iteration starts from.
        seed: of the random vectors it adds.

    Returns:
        side -> basis, contiguous, of `matrix`'s dtype.
    """
    exact = method == "svd" or (method == "auto" and min(matrix.shape) <= EXACT_SIDE)
    values = matrix.float()
    if exact:
        left, _, right = torch.linalg.svd(values, full_matrices=False)
    else:
        left, right = _subspace_iteration(values, rank, previous or {}, seed)
    found: dict[Side, Tensor] = {"left": left[:, :rank], "right": right[:rank]}
    # A slice would keep all singular vectors in memory, and another layout would round differently after a reload.
    return {
        side: found[side].to(matrix.dtype, copy=True, memory_format=torch.contiguous_format) for side in sides
    }


def project(matrix: Tensor, bases: Mapping[Side, Tensor]) -> Tensor:
    """(m, n) -> R: Uᵀ G (r, n), G Vᵀ (m, r), or Uᵀ G Vᵀ (r, r)."""
    if "left" in bases:
        matrix = bases["left"].t() @ matrix
    return matrix @ bases["right"].t() if "right" in bases else matrix


def project_back(low: Tensor, bases: Mapping[Side, Tensor]) -> Tensor:
    """R -> (m, n): U R, R V, or U R V."""
    if "left" in bases:
        low = bases["left"] @ low
    return low @ bases["right"] if "right" in bases else low


def overlap(old: Mapping[Side, Tensor], new: Mapping[Side, Tensor]) -> Tensor:
    """Mean squared cosine of the principal angles between two subspaces, in [0, 1], over their sides; a scalar.

    It does not depend on signs, order or rotation of the vectors.
    """
    return torch.stack([turn(old, new, side).float().square().sum(0).mean() for side in new]).mean()


def turn(old: Mapping[Side, Tensor], new: Mapping[Side, Tensor], side: Side) -> Tensor:
    """(r, r): what new coordinates are of old ones. On the left U_newᵀ U_old, on the right V_old V_newᵀ."""
    if side == "left":
        return new["left"].t() @ old["left"]
    return old["right"] @ new["right"].t()


def _subspace_iteration(
    matrix: Tensor, rank: int, previous: Mapping[Side, Tensor], seed: int
) -> tuple[Tensor, Tensor]:
    """Approximate singular vectors U (m, r') and V (r', n) of the largest singular values, r' ≥ rank."""
    rows, columns = matrix.shape
    width = min(rank + _OVERSAMPLING, rows, columns)
    # Drawn on the CPU, so that a seed means the same on every device.
    guess = torch.randn(columns, width, generator=torch.Generator().manual_seed(seed)).to(matrix.device)
    if "right" in previous:
        guess[:, :rank] = previous["right"].float().t()
    elif "left" in previous:
        guess[:, :rank] = matrix.t() @ previous["left"].float()
    basis = torch.linalg.qr(guess).Q
    product = matrix @ basis
    energy = product.square().sum()
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(matrix.t() @ torch.linalg.qr(product).Q).Q
        product, before = matrix @ basis, energy
        energy = product.square().sum()
        if bool(energy - before <= _CONVERGED * energy):
            break
    outer, inner = torch.linalg.qr(product)
    left, _, right = torch.linalg.svd(inner)
    return outer @ left, right @ basis.t()
