"""A linear layer whose weight is kept as packed integers of 4 or 8 bits, in the layout of ONNX Runtime's MatMulNBits.

    w = (q - z) · s, one s and one z for each group of neighbouring inputs of an output

The layout: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.errors import CheckpointError, StepError

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class WeightGrid:
    """The integers a weight is rounded to.

    Attributes:
        bits: 4 or 8.
        group_size: inputs that share a scale: 32, 64 or 128. The last group of a layer may be shorter.
        symmetric: the zero point is 2^(bits-1) and not stored; otherwise each group has its own.

    Raises:
        StepError: at construction, for another number.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in (4, 8):
            raise StepError(f"weights of {self.bits!r} bits cannot be packed; give 4 or 8")
        if isinstance(self.group_size, bool) or self.group_size not in GROUP_SIZES:
            raise StepError(
                f"group size is {self.group_size!r}; give one of {', '.join(map(str, GROUP_SIZES))}"
            )
        if not isinstance(self.symmetric, bool):
            raise StepError(f"symmetric is {self.symmetric!r}; give true or false")

    @property
    def high(self) -> int:
        """The highest integer; the lowest is 0."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return int(2 ** (self.bits - 1))

    def num_groups(self, inputs: int) -> int:
        """Groups of a layer of so many inputs."""
        return -(-inputs // self.group_size)


class PackedLinear(nn.Module):
    """`F.linear(x, weight, bias)` with `weight` made from integers at every call.

    Attributes:
        packed: (outputs, groups, group_size · bits / 8) uint8; of 4 bits the first of two neighbours is the low half.
        scales: (outputs, groups) float32.
        zero_points: (outputs, ⌈groups · bits / 8⌉) uint8, packed alike, or None where the grid is symmetric.
        bias: (outputs,) parameter or None.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, grid: WeightGrid, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
        groups = grid.num_groups(in_features)
        row = grid.group_size * grid.bits // 8
        self.register_buffer("packed", torch.zeros(out_features, groups, row, dtype=torch.uint8))
        self.register_buffer("scales", torch.ones(out_features, groups))
        zeros = None
        if not grid.symmetric:
            zeros = torch.zeros(out_features, -(-groups * grid.bits // 8), dtype=torch.uint8)
        self.register_buffer("zero_points", zeros)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    @torch.no_grad()
    def put(self, integers: Tensor, scales: Tensor, zero_points: Tensor) -> None:
        """Store a rounded weight.

        Args:
            integers: (outputs, inputs) whole numbers from 0 to `grid.high`.
            scales, zero_points: (outputs, groups); zero points are whole numbers too.
        """
        grid, groups = self.grid, self.scales.shape[1]
        padding = groups * grid.group_size - self.in_features
        # What pads the last group stands for 0, like in the tools that write this layout.
        filled = torch.cat([integers.to(zero_points), zero_points[:, -1:].expand(-1, padding)], 1)
        self.packed.copy_(pack(filled, grid.bits).reshape(self.packed.shape))
        self.scales.copy_(scales)
        if self.zero_points is not None:
            self.zero_points.copy_(pack(zero_points, grid.bits))

    def integers(self) -> Tensor:
        """(outputs, inputs) uint8: the weight as it is stored."""
        return unpack(self.packed.flatten(1), self.grid.bits)[:, : self.in_features]

    def zeros(self) -> Tensor:
        """(outputs, groups) uint8: the zero points."""
        if self.zero_points is None:
            return torch.full_like(self.scales, self.grid.middle, dtype=torch.uint8)
        return unpack(self.zero_points, self.grid.bits)[:, : self.scales.shape[1]]

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs) in the scales' dtype: what the integers stand for, for networks that read it too."""
        scales, size = self.scales, self.grid.group_size
        whole = unpack(self.packed.flatten(1), self.grid.bits).reshape(*scales.shape, size)
        value = (whole.to(scales.dtype) - self.zeros().to(scales.dtype)[:, :, None]) * scales[:, :, None]
        return value.flatten(1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, inputs) float -> (…, outputs) of its dtype."""
        if torch.compiler.is_exporting():
            grid = self.grid
            y: Tensor = torch.ops.cveff.matmul_nbits(
                x, self.packed, self.scales, self.zero_points, self.in_features, grid.bits, grid.group_size
            )
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Sizes and grid."""
        kind = "symmetric" if self.grid.symmetric else "zero points"
        return (
            f"{self.in_features} -> {self.out_features}, {self.grid.bits} bits in groups of {self.grid.group_size}, "
            f"{kind}, bias={self.bias is not None}"
        )

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # `copy_` would turn floats into bytes without a word, and no shape shows that a scale is not a number.
        for name, buffer in self.named_buffers(recurse=False):
            value = state.get(prefix + name)
            if value is None or value.shape != buffer.shape:
                continue  # named by the strict check
            if value.dtype.is_floating_point != buffer.dtype.is_floating_point:
                raise CheckpointError(
                    f"{prefix}{name} holds {value.dtype}, not {buffer.dtype}; the weights are damaged or another's"
                )
            if name == "scales" and not bool((torch.isfinite(value) & (value != 0)).all()):
                raise CheckpointError(f"{prefix}scales holds zeros, NaN or infinity; the weights are damaged")
        super()._load_from_state_dict(state, prefix, *rest)


def pack(values: Tensor, bits: int) -> Tensor:
    """(rows, n) whole numbers -> (rows, ⌈n · bits / 8⌉) uint8; an odd last half byte is filled with 0."""
    whole = values.to(torch.uint8)
    if bits == 8:
        return whole
    if whole.shape[1] % 2:
        whole = F.pad(whole, (0, 1))
    return whole[:, 0::2] | (whole[:, 1::2] << 4)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(rows, bytes) uint8 -> (rows, bytes · 8 / bits) uint8."""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1)


@torch.library.custom_op("cveff::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    inputs: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """`PackedLinear` without its bias as one operator, which the ONNX exporter writes as MatMulNBits.

    Args:
        x: (…, inputs) float.
        packed, scales, zero_points: as the layer keeps them.
    """
    layer = PackedLinear(inputs, len(packed), WeightGrid(bits, group_size, zero_points is None), bias=False)
    layer.packed, layer.scales, layer.zero_points = packed, scales, zero_points
    return F.linear(x, layer.weight.to(x.dtype))


@matmul_nbits.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    inputs: int,
    bits: int,
    group_size: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])
