"""The edit that keeps the centres of depthwise kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from timm.layers import Conv2dSame
from torch import Tensor, nn

from cveff.errors import StepError


@dataclass(frozen=True)
class ShrinkKernels:
    """Give convolutions smaller square kernels, the centres of what they have, and as much less padding.

    Attributes:
        sides: path of a convolution -> side of its kernel, of the parity of the old one.
    """

    sides: Mapping[str, int]
    kind: ClassVar[str] = "shrink_kernels"

    def apply(self, module: nn.Module) -> nn.Module:
        """Change `module` in place and return it.

        Raises:
            StepError: a path is no convolution, or its kernel cannot be shrunk to that side.
        """
        for path, side in self.sides.items():
            conv = convolution(module, path)
            old = conv.kernel_size[0]
            if not can_shrink(conv, side):
                raise StepError(
                    f"{path} has a kernel of {tuple(conv.kernel_size)} and padding {conv.padding}, which cannot be "
                    f"shrunk to {side}; give a smaller side of the same parity"
                )
            if not _is_padded_in_forward(conv) and not isinstance(conv.padding, str):
                less = conv.dilation[0] * (old - side) // 2
                conv.padding = (conv.padding[0] - less, conv.padding[1] - less)
                conv._reversed_padding_repeated_twice = [
                    amount for amount in reversed(conv.padding) for _ in (0, 1)
                ]
            elif isinstance(conv.padding, str):
                total = conv.dilation[0] * (side - 1)
                conv._reversed_padding_repeated_twice = [total // 2, total - total // 2] * 2
            conv.kernel_size = (side, side)
            conv.weight = nn.Parameter(
                centre(conv.weight.detach(), side).clone(), requires_grad=conv.weight.requires_grad
            )
        return module


def centre(kernel: Tensor, side: int) -> Tensor:
    """The middle of square kernels: (…, K, K) -> (…, side, side), a view."""
    start = (kernel.shape[-1] - side) // 2
    return kernel[..., start : start + side, start : start + side]


def convolution(module: nn.Module, path: str) -> nn.Conv2d:
    """The convolution at `path`.

    Raises:
        StepError: there is none.
    """
    try:
        found = module.get_submodule(path)
    except AttributeError:
        found = nn.Identity()
    if not isinstance(found, nn.Conv2d):
        raise StepError(f"the network has no convolution {path}; the edit is another's")
    return found


def can_shrink(conv: nn.Conv2d, side: int) -> bool:
    """Whether the same images come out with a kernel of this side: padding makes up for the whole difference."""
    height, width = conv.kernel_size
    if height != width or not 1 <= side <= height or (height - side) % 2:
        return False
    if _is_padded_in_forward(conv) or conv.padding == "same":
        return True
    less = conv.dilation[0] * (height - side) // 2
    return (
        not isinstance(conv.padding, str)
        and conv.dilation[0] == conv.dilation[1]
        and min(conv.padding) >= less
    )


def _is_padded_in_forward(conv: nn.Conv2d) -> bool:
    """TensorFlow's padding depends on the image; timm computes it from the weight each time."""
    return isinstance(conv, Conv2dSame)
