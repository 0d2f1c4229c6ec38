"""Round a weight matrix to integers in groups of inputs: to the nearest, or so that errors make up for each other.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023):
columns are rounded one after the other, and those to come move so that the outputs' squared error E‖(W - Q) x‖² stays
least (Hassibi & Stork's optimal brain surgeon). A group's scale is found when the group is reached, from its weights as
they are then. Groups come in the order of their inputs' energy and columns within a group too, so a group's columns
stay together (group-aware reordering: Gafni et al., "Dual Precision Quantization", 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cveff.compress.quant.packed_linear import WeightGrid
from cveff.errors import StepError

DAMPING = 0.01
"""Added to the second moments' diagonal, relative to its mean (GPTQ, section 3.3)."""
SHRINKS = tuple(1 - step / 40 for step in range(17))
"""Shares of a group's range that are tried for its scale: 1 to 0.6."""


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid.

    Attributes:
        integers: (outputs, inputs), whole numbers in float64.
        scales: (outputs, groups) float64 that float32 holds exactly.
        zero_points: (outputs, groups), whole numbers in float64.
    """

    integers: Tensor
    scales: Tensor
    zero_points: Tensor

    def weight(self, group_size: int) -> Tensor:
        """(outputs, inputs) float64: what the integers stand for."""
        inputs = self.integers.shape[1]
        zero, scale = (
            part.repeat_interleave(group_size, 1)[:, :inputs] for part in (self.zero_points, self.scales)
        )
        return (self.integers - zero) * scale


def round_nearest(weight: Tensor, grid: WeightGrid, *, search: bool = True) -> Rounded:
    """Each weight to the nearest integer.

    Args:
        weight: (outputs, inputs), finite.
        search: scales of least squared error; otherwise those that cover the range.
    """
    values = weight.double()
    parts = []
    for group in values.split(grid.group_size, 1):
        scale, zero = find_scale(group, grid, search=search)
        parts.append((_integers(group, scale, zero, grid), scale, zero))
    integers, scales, zeros = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return Rounded(integers, scales, zeros)


def round_compensated(
    weight: Tensor,
    moments: Tensor,
    grid: WeightGrid,
    *,
    damping: float = DAMPING,
    ordered: bool = True,
    search: bool = True,
) -> Rounded:
    """Column by column; the columns to come make up for each error.

    Args:
        weight: (outputs, inputs), finite.
        moments: (inputs, inputs) E[x xᵀ] of what the layer reads, finite; any positive factor does.
        ordered: inputs that matter most first, while there are others left to make up for them.
        search: scales of least squared error, each column weighted as the method does; otherwise those that cover
            the range.

    Raises:
        StepError: the moments are no second moments (not positive definite even when damped).
    """
    values = weight.double()
    energy = moments.diagonal().double()
    groups = list(torch.arange(values.shape[1], device=values.device).split(grid.group_size))
    places = list(range(len(groups)))
    if ordered:
        places.sort(key=lambda place: -float(energy[groups[place]].mean()))
        groups = [group[energy[group].argsort(descending=True, stable=True)] for group in groups]
    order = torch.cat([groups[place] for place in places])
    factor = _inverse_factor(moments.double()[order][:, order], damping)

    remaining = values.T[order].contiguous()  # (inputs, outputs): what is updated together lies together
    is_zero = remaining == 0  # a sparse weight's zeros are not for making up: they stay
    integers = torch.empty_like(remaining)
    scales, zeros = (values.new_empty(len(groups), len(values)) for _ in range(2))
    start = 0
    for place in places:
        stop = start + len(groups[place])
        importance = factor.diagonal()[start:stop].pow(-2)
        found = find_scale(remaining[start:stop].T.contiguous(), grid, importance, search=search)
        scale, zero = (part[:, 0] for part in found)
        scales[place], zeros[place] = scale, zero
        errors = remaining.new_empty(stop - start, len(values))
        for row in range(start, stop):
            whole = torch.where(is_zero[row], zero, _integers(remaining[row], scale, zero, grid))
            integers[row] = whole
            error = (remaining[row] - (whole - zero) * scale) / factor[row, row]
            errors[row - start] = error
            remaining[row:stop] -= factor[row, row:stop, None] * error
        # The inputs after the group are brought up to date at once, by one matrix product.
        remaining[stop:] -= factor[start:stop, stop:].T @ errors
        start = stop
    return Rounded(integers[order.argsort()].T, scales.T, zeros.T)


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """E‖(W - Q) x‖² / E‖W x‖²; 0 where the layer's output always is.

    Args:
        weight, rounded: (outputs, inputs).
        moments: (inputs, inputs) E[x xᵀ].
    """
    second = moments.double()
    lost, whole = ((part @ second * part).sum() for part in (weight.double() - rounded, weight.double()))
    return float(lost / whole) if whole > 0 else 0.0


def find_scale(
    values: Tensor, grid: WeightGrid, importance: Tensor | None = None, *, search: bool = True
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a group for each output.

    Args:
        values: (outputs, size) float64.
        importance: (size,) weights of the squared errors; alike by default.
        search: try `SHRINKS` of the range and keep the least error; otherwise cover the range.

    Returns:
        (outputs, 1) float64 each. A symmetric grid has one integer more below zero than above, so a scale is negative
        where the value of greatest magnitude is positive.
    """
    low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in SHRINKS if search else (1.0,):
        for scale, zero in _candidates(shrink * low, shrink * high, grid, both_signs=search):
            error = (values - (_integers(values, scale, zero, grid) - zero) * scale).square()
            total = (error if importance is None else error * importance).sum(1, keepdim=True)
            if best is None:
                best = total, scale, zero
                continue
            is_less = total < best[0]
            best = (
                torch.where(is_less, total, best[0]),
                torch.where(is_less, scale, best[1]),
                torch.where(is_less, zero, best[2]),
            )
    assert best is not None
    return best[1], best[2]


def _candidates(
    low: Tensor, high: Tensor, grid: WeightGrid, *, both_signs: bool
) -> list[tuple[Tensor, Tensor]]:
    if not grid.symmetric:
        scale = _stored((high - low) / grid.high)
        return [(scale, (-low / scale).round().clamp(0, grid.high))]
    zero = torch.full_like(low, grid.middle)
    extreme = torch.where(high > -low, high, low)
    scale = _stored(-extreme / grid.middle)
    return [(scale, zero), (-scale, zero)] if both_signs else [(scale, zero)]


def _stored(scale: Tensor) -> Tensor:
    """As float32 holds it: errors are those of the numbers that are kept. 1 for a group of zeros."""
    rounded = scale.float().double()
    return torch.where(rounded.abs() < torch.finfo(torch.float32).tiny, 1.0, rounded)


def _integers(values: Tensor, scale: Tensor, zero: Tensor, grid: WeightGrid) -> Tensor:
    return ((values / scale).round() + zero).clamp(0, grid.high)


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper U with UᵀU the inverse of the damped moments."""
    mean = float(moments.diagonal().mean())
    # A layer that only ever saw zeros: any rounding is as good, so each weight counts alike.
    ridge = damping * mean if mean > 0 else 1.0
    damped = moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:
        raise StepError(
            f"second moments of the inputs are not positive definite (damping {damping}); "
            "give more calibration data or a larger damping"
        ) from error
