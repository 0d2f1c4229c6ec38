"""Some outputs or inputs of a linear layer in plain PyTorch: the truth, which copies the rows it picks."""

from __future__ import annotations

from torch import Tensor


def some_outputs(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """(B, inputs) · weight[index]ᵀ: (B, K) float32."""
    return x.float() @ weight.index_select(0, index).float().T


def some_inputs(values: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """(B, K) · weight[index]: (B, outputs) float32."""
    return values.float() @ weight.index_select(0, index).float()
