"""The network as it ships: uint8 NHWC images in, logits out, with scaling and normalisation inside."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cveff.compress.quant.network import is_cast
from cveff.runtime.input_spec import InputSpec


class NormalizedModel(nn.Module):
    """`network((images / 255 - mean) / std)`, as one subtraction and one multiplication in NHWC.

    How it is written decides what it costs on a small network (measured: "uint8_input" and "rows_of_three" in
    model_zoo/results/choices.json):

    - 1 / 255 is inside the constants, so no pass over the image is spent on it.
    - Subtracting and scaling stay apart, so that `simplify` can move the scale into the first convolution's
      weights; the subtraction must stay, because zero padding has to keep meaning "an average pixel".
    - The constants are one row of the image, (1, 1, W, C), not one value a channel: engines that compute in
      NHWC (ONNX Runtime's int8) would otherwise loop over rows of 3 values, many times slower.

    Args:
        network: takes float (N, C, H, W) and returns logits (N, classes).
        spec: width, mean and std per channel.
    """

    offset: torch.Tensor
    scale: torch.Tensor

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        mean = torch.tensor(spec.mean, dtype=torch.float64)
        std = torch.tensor(spec.std, dtype=torch.float64)
        row = (1, 1, spec.size[1], spec.channels)
        self.register_buffer("offset", (255 * mean).float().expand(row).contiguous())
        self.register_buffer("scale", (1 / (255 * std)).float().expand(row).contiguous())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (N, H, W, C) uint8 -> logits (N, classes) float32."""
        pixels = (images.to(torch.float32) - self.offset) * self.scale  # (N, H, W, C)
        # Contiguous, or channels-last strides spread through the trace and pooling becomes a gather by index.
        return self.network(pixels.permute(0, 3, 1, 2).contiguous())  # (N, C, H, W) -> (N, classes)


def deployable(network: nn.Module, spec: InputSpec) -> NormalizedModel:
    """A copy of `network` with normalisation, in evaluation mode, on the CPU; `network` is untouched.

    In float32, unless the network has types of its own (`cveff.compress.quant.half`).

    Attention is written as plain matrix products and softmax: the fused operator exports as a dozen
    shape computations a block, which quantizers cannot see through.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if getattr(module, "fused_attn", False) is True:
            module.fused_attn = False  # type: ignore[assignment]
    if not is_cast(network):
        network = network.float()
    return NormalizedModel(network.cpu(), spec).eval()
