"""Rounding to integers and back, as ONNX defines it, with gradients for what is rounded and for the step (LSQ+).

    q(x) = (clip(round(x / s) + z, low, high) - z) · s

Esser et al., "Learned Step Size Quantization", ICLR 2020; Bhalgat et al., "LSQ+", CVPR-W 2020. Rounding is to the
nearest, halves to even, and x is divided by s (not multiplied by 1/s): so the exported QuantizeLinear gives the same
integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cveff.compress.quant.float8_values import FLOAT8_LARGEST, RoundToFloat8, round_to_float8
from cveff.errors import StepError

TINY = 1e-8
"""The least step: a tensor that is always zero gets it, and rounds to zero."""


@dataclass(frozen=True)
class Grid:
    """The integers a tensor is rounded to.

    Attributes:
        bits: 2 to 8.
        signed: from -2^(bits-1), or from 0.
        symmetric: the zero point is fixed, at 0 where `signed`, and the steps reach equally far to both sides.
        narrow: without the lowest integer, so that a signed range is as wide on both sides (weights).
        float8: not integers but the values of E4M3 (`float8_values`).
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    narrow: bool = False
    float8: bool = False

    def __post_init__(self) -> None:
        if self.float8 and not (self.bits == 8 and self.signed and self.symmetric and not self.narrow):
            raise StepError(
                "float8 has 8 bits, a sign and no zero point; give signed=True and symmetric=True"
            )
        if not 2 <= self.bits <= 8:
            raise StepError(f"bits is {self.bits}; give 2 to 8")

    @property
    def low(self) -> int:
        """The lowest integer, or value of float8."""
        if self.float8:
            return -FLOAT8_LARGEST
        return (-(2 ** (self.bits - 1)) if self.signed else 0) + self.narrow

    @property
    def high(self) -> int:
        """The highest integer, or value of float8."""
        if self.float8:
            return FLOAT8_LARGEST
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    def steps(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, both of the ranges' shape, that cover [minimum, maximum] and zero.

        Args:
            minimum, maximum: finite, any shape; one range an element.

        Raises:
            StepError: a range is not finite, or its ends are the wrong way round.
        """
        if not bool(torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
            raise StepError("a range is NaN or infinite; the network overflows on these images")
        if bool((minimum > maximum).any()):
            raise StepError("a range's minimum is above its maximum")
        # Zero must be an integer: padding writes it, and a ReLU's output is full of it.
        minimum, maximum = minimum.clamp(max=0).double(), maximum.clamp(min=0).double()
        if self.symmetric:
            reach = torch.maximum(-minimum, maximum)
            zero = 0 if self.signed else 2 ** (self.bits - 1)
            scale = (reach / min(self.high - zero, zero - self.low)).clamp(min=TINY)
            return scale.float(), torch.full_like(scale, zero).float()
        scale = ((maximum - minimum) / (self.high - self.low)).clamp(min=TINY).float()
        zero_point = (self.low - (minimum / scale.double()).round()).clamp(self.low, self.high)
        return scale, zero_point.float()


class FakeQuantize(nn.Module):
    """Rounds a tensor to a grid; one step for all of it, or one for each index of `axis`.

    Args:
        size: number of steps; 1 with `axis` None.
        axis: of the tensor, that has a step each.

    Attributes:
        scale, zero_point: the steps, buffers of shape () or (size,).
        enabled: False passes tensors through.
        moves: what training adds to the logarithm of the scale and, if there are two, to the zero point in halves of
            the grid; trained, and not a part of this module. None: the steps stay.
    """

    scale: Tensor
    zero_point: Tensor
    moves: tuple[Tensor, ...] | None = None

    def __init__(self, grid: Grid, size: int = 1, axis: int | None = None) -> None:
        super().__init__()
        self.grid, self.axis = grid, axis
        self.enabled = True
        shape = () if axis is None else (size,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape))

    def set_steps(self, scale: Tensor, zero_point: Tensor) -> None:
        """Put steps, of shape () or (size,).

        Raises:
            StepError: other shapes, or steps that are not positive and finite.
        """
        if scale.shape != self.scale.shape or zero_point.shape != self.zero_point.shape:
            raise StepError(f"steps have shape {tuple(scale.shape)}; give {tuple(self.scale.shape)}")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise StepError("a step is not a positive number")
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)

    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """Put the steps that cover a range."""
        self.set_steps(*self.grid.steps(minimum, maximum))

    @torch.no_grad()
    def settle(self) -> None:
        """Take the moves into the steps, and begin again at no move."""
        if self.moves is None:
            return
        self.scale.mul_(self.moves[0].exp()).clamp_(min=TINY)
        if len(self.moves) > 1:
            moved = self.zero_point + self._reach * self.moves[1]
            self.zero_point.copy_(moved.clamp(self.grid.low, self.grid.high))
        for move in self.moves:
            move.zero_()

    @property
    def _reach(self) -> float:
        return (self.grid.high - self.grid.low) / 2

    def integers(self, x: Tensor) -> Tensor:
        """What `x` is stored as, float tensor of whole numbers (of float8's values)."""
        scale, zero = self._broadcast(x)
        if self.grid.float8:
            return round_to_float8(x / scale)
        return torch.round(x / scale).add(torch.round(zero)).clamp(self.grid.low, self.grid.high)

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape, rounded."""
        if not self.enabled:
            return x
        if torch.compiler.is_exporting() and self.grid.float8:
            axis = -1 if self.axis is None else self.axis
            return torch.ops.cveff.quantize_dequantize_float8(x, self.scale, self.zero_point, axis)
        if torch.compiler.is_exporting():
            return torch.ops.cveff.quantize_dequantize(
                x,
                self.scale,
                self.zero_point,
                -1 if self.axis is None else self.axis,
                self.grid.low,
                self.grid.high,
            )
        scale, zero = self._broadcast(x)
        if self.grid.float8:
            return RoundToFloat8.apply(x, scale)  # type: ignore[no-any-return]
        if torch.is_grad_enabled() and (x.requires_grad or self.moves is not None):
            # Gradients of a step sum over many elements; without this factor they would drown the weights'.
            elements = x.numel() / max(self.scale.numel(), 1)
            if self.axis is None:
                elements /= max(len(x), 1)  # activations: by the tensor of one image
            factor = 1 / math.sqrt(max(elements, 1) * max(self.grid.high, 1))
            return _Round.apply(x, scale, zero, self.grid.low, self.grid.high, factor)  # type: ignore[no-any-return]
        return _rounded(x, scale, zero, self.grid.low, self.grid.high)

    def extra_repr(self) -> str:
        """Grid and axis."""
        if self.grid.float8:
            return f"float8, axis={self.axis}"
        return f"{self.grid.bits} bits, {'signed' if self.grid.signed else 'unsigned'}, axis={self.axis}"

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = self.scale, self.zero_point
        if self.moves is not None and torch.is_grad_enabled():
            scale = scale * self.moves[0].exp()
            if len(self.moves) > 1:
                zero = zero + self._reach * self.moves[1]
        if self.axis is None:
            return scale, zero
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return scale.reshape(shape), zero.reshape(shape)


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    whole = torch.round(zero)
    return (torch.round(x / scale).add_(whole).clamp_(low, high).sub_(whole)).mul_(scale)


class _Round(torch.autograd.Function):
    """Straight-through inside the range; LSQ's gradient for the step, LSQ+'s for the zero point."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, factor: float
    ) -> Tensor:
        whole = torch.round(zero)
        ratio = x / scale
        position = torch.round(ratio) + whole
        inside = (position >= low) & (position <= high)
        steps = position.clamp(low, high) - whole
        ctx.save_for_backward(ratio, steps, inside, scale)
        ctx.factor, ctx.shapes = factor, (scale.shape, zero.shape)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        ratio, steps, inside, scale = ctx.saved_tensors
        scale_shape, zero_shape = ctx.shapes
        of_x = gradient * inside if ctx.needs_input_grad[0] else None
        of_scale = of_zero = None
        if ctx.needs_input_grad[1]:
            of_scale = _sum_to(gradient * torch.where(inside, steps - ratio, steps), scale_shape) * ctx.factor
        if ctx.needs_input_grad[2]:
            of_zero = _sum_to(torch.where(inside, 0.0, -gradient * scale), zero_shape) * ctx.factor
        return of_x, of_scale, of_zero, None, None, None


def _sum_to(value: Tensor, shape: torch.Size) -> Tensor:
    return value.sum_to_size(shape) if len(shape) else value.sum()


@torch.library.custom_op("cveff::quantize_dequantize", mutates_args=())
def quantize_dequantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int
) -> Tensor:
    """`FakeQuantize` as one operator, which the ONNX exporter writes as QuantizeLinear and DequantizeLinear.

    Args:
        scale, zero_point: (), or (size,) along `axis` of `x`.
        axis: -1: one step for all.
    """
    if axis >= 0:
        shape = [1] * x.ndim
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return _rounded(x, scale, zero_point, low, high)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)
