"""Rounding to float8 E4M3 as ONNX defines it: 4 bits of exponent, 3 of mantissa, up to 448, no infinity.

Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOAT8_LARGEST = 448


def round_to_float8(x: Tensor) -> Tensor:
    """The nearest value of E4M3, halves to even; what is larger becomes the largest, as ONNX's `saturate=1` says.

    Args:
        x: of any shape, float.

    Returns:
        the same shape and type.
    """
    return x.clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(torch.float8_e4m3fn).to(x.dtype)


class RoundToFloat8(torch.autograd.Function):
    """`x` rounded in steps of `scale`, with the gradient of clipping; steps are not learned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio)
        return round_to_float8(ratio) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (ratio,) = ctx.saved_tensors
        return gradients[0] * (ratio.abs() <= FLOAT8_LARGEST), None


@torch.library.custom_op("cveff::quantize_dequantize_float8", mutates_args=())
def quantize_dequantize_float8(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """`RoundToFloat8` as one operator, which the ONNX exporter writes as QuantizeLinear and DequantizeLinear.

    Args:
        scale: (), or (size,) along `axis` of `x`.
        zero_point: zeros of the same shape; there because ONNX takes the type from it.
        axis: -1: one step for all.
    """
    if axis >= 0:
        shape = [1] * x.ndim
        shape[axis] = -1
        scale = scale.reshape(shape)
    return round_to_float8(x / scale) * scale


@quantize_dequantize_float8.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x)
