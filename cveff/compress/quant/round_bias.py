"""Biases as engines keep them: 32-bit integers in steps of their layer's sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cveff.compress.quant.fake_quant import FakeQuantize


class RoundBias(nn.Module):
    """Rounds a bias to the product of the steps of its layer's input and weight; gradients pass straight through.

    Args:
        of_input, of_weight: what rounds them; not a part of this module.
    """

    def __init__(self, of_input: FakeQuantize, of_weight: FakeQuantize) -> None:
        super().__init__()
        self._of = (of_input, of_weight)

    def forward(self, bias: Tensor) -> Tensor:
        """`bias`, (outputs,), rounded; as it is in an export, whose writer rounds it the same way."""
        of_input, of_weight = self._of
        if torch.compiler.is_exporting() or not (of_input.enabled and of_weight.enabled):
            return bias
        with torch.no_grad():
            step = of_input.scale.double() * of_weight.scale.double()
            error = ((bias.double() / step).round() * step).to(bias.dtype) - bias
        return bias + error
