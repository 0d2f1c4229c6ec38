"""The network as it ships: uint8 NHWC images in, logits out, with scaling and normalisation inside."""

from __future__ import annotations

import torch
from torch import nn

from cveff.runtime.input_spec import InputSpec


class NormalizedModel(nn.Module):
    """`network((images / 255 - mean) / std)`, written as one subtraction and one multiplication.

    The pixels' scale 1 / 255 is inside the constants, so no pass over the image is spent on it. The two are
    kept apart (not one fused `x * a + b`) so that the multiplication can later move into the first
    convolution's weights while zero padding keeps meaning "an average pixel".

    Args:
        network: takes float (N, C, H, W) and returns logits (N, classes).
        spec: mean and std per channel.
    """

    offset: torch.Tensor
    scale: torch.Tensor

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        mean = torch.tensor(spec.mean, dtype=torch.float64)
        std = torch.tensor(spec.std, dtype=torch.float64)
        shape = (1, spec.channels, 1, 1)
        self.register_buffer("offset", (255 * mean).float().reshape(shape))
        self.register_buffer("scale", (1 / (255 * std)).float().reshape(shape))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (N, H, W, C) uint8 -> logits (N, classes) float32."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)  # (N, C, H, W)
        return self.network((pixels - self.offset) * self.scale)
