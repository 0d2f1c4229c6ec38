"""A convolution whose kernel is mixed from several for each image (CondConv, Yang et al., NeurIPS 2019).

`y = conv(x, Σₖ rₖ(x) Wₖ)` with `r(x) = sigmoid(R · mean(x) + b)` (arXiv:1904.04971, section 3, equations 1 and 2):
as many kernels as experts are stored, and one convolution is computed.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.errors import StepError

Pair = tuple[int, int]


class CondConv2d(nn.Module):
    """Stands in for a convolution: at first every expert is its kernel, and the experts' shares add up to one.

    Args:
        convolution: a plain one; see `not_replaceable`.
        num_experts: kernels, 2 or more.

    Raises:
        StepError: the convolution cannot be replaced; the message goes on from its name.
    """

    def __init__(self, convolution: nn.Conv2d, num_experts: int) -> None:
        super().__init__()
        reason = not_replaceable(convolution)
        if reason:
            raise StepError(reason)
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.kernel_size, self.stride = cast(Pair, convolution.kernel_size), cast(Pair, convolution.stride)
        self.padding, self.dilation = cast(Pair, convolution.padding), cast(Pair, convolution.dilation)
        self.groups, self.num_experts = convolution.groups, num_experts
        self.pads_same = type(convolution) is Conv2dSame
        weight = convolution.weight.detach().flatten(1)
        # Three axes: networks with parameters of five cannot be laid out channels-last.
        self.weight = nn.Parameter(torch.stack([weight] * num_experts))  # (K, out, in / groups * kh * kw)
        bias = None if convolution.bias is None else convolution.bias.detach()
        self.bias = None if bias is None else nn.Parameter(torch.stack([bias] * num_experts))  # (K, out)
        self.routing = nn.Linear(self.in_channels, num_experts, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            self.routing.weight.zero_()
            self.routing.bias.fill_(-math.log(num_experts - 1))  # sigmoid of it is 1 / K

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in, H, W) float -> (B, out, H', W')."""
        shares = self.routing(x.mean((2, 3))).sigmoid()  # (B, K)
        weight = shares @ self.weight.flatten(1)  # (B, out * in / groups * kh * kw)
        bias = None if self.bias is None else shares @ self.bias  # (B, out)
        if self.pads_same:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        # The number of groups is a constant of an ONNX file, and the batch is not.
        return (
            self._multiply(x, weight, bias)
            if torch.compiler.is_exporting()
            else self._convolve(x, weight, bias)
        )

    def extra_repr(self) -> str:
        """What `print` shows beside the routing."""
        return (
            f"{self.in_channels}, {self.out_channels}, experts={self.num_experts}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, groups={self.groups}"
        )

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One convolution in which every image is a group of its own."""
        batch, channels, height, width = x.shape
        y = F.conv2d(
            x.reshape(1, batch * channels, height, width),
            weight.reshape(batch * self.out_channels, -1, *self.kernel_size),
            None if bias is None else bias.reshape(-1),
            self.stride,
            self.padding,
            self.dilation,
            batch * self.groups,
        )
        return y.reshape(batch, self.out_channels, *y.shape[2:])

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same as products of matrices, one an image and group: shapes do not name the batch."""
        x = F.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        height, width = (
            (side - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, dilation in zip(
                x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        )
        # Two gathers, as slices would be two nodes of the file for each weight of the kernel.
        x = x.index_select(2, self._places(0, height, x.device)).index_select(
            3, self._places(1, width, x.device)
        )
        x = x.reshape(-1, self.in_channels, self.kernel_size[0], height, self.kernel_size[1], width)
        rows = self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]
        columns = x.permute(0, 1, 2, 4, 3, 5).reshape(-1, self.groups, rows, height * width)
        kernels = weight.reshape(-1, self.groups, self.out_channels // self.groups, rows)
        y = (kernels @ columns).reshape(-1, self.out_channels, height, width)
        return y if bias is None else y + bias[:, :, None, None]

    def _places(self, axis: int, size: int, device: torch.device) -> Tensor:
        """For each weight along an axis of the kernel, which pixels it meets: (kernel * size,) int64."""
        weights = self.dilation[axis] * torch.arange(self.kernel_size[axis], device=device)
        return (weights[:, None] + self.stride[axis] * torch.arange(size, device=device)).flatten()


def not_replaceable(layer: nn.Module) -> str:
    """Why a layer cannot become a `CondConv2d`; "" if it can."""
    # Subclasses compute something else from the same weight: standardised or normalised ones, adapters.
    if type(layer) not in (nn.Conv2d, Conv2dSame):
        return f"is a {type(layer).__name__}, not a plain Conv2d"
    convolution = cast(nn.Conv2d, layer)
    if convolution.padding_mode != "zeros":
        return f"pads with {convolution.padding_mode!r} instead of zeros"
    if isinstance(convolution.padding, str):
        return f"has padding {convolution.padding!r} instead of numbers"
    if "weight" not in convolution._parameters:
        return "computes its weight (a parametrisation, weight or spectral norm)"
    return ""
