"""The MLP of some neurons in plain PyTorch: the truth of the kernels. It copies the weights it picks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "identity": lambda x: x,
}
"""By name; a kernel knows them by their place."""


def gather_mlp(
    x: Tensor,
    neurons: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    gated: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Arguments as the dispatcher's, without the output's bias; float32 inside.

    Returns:
        (B, outputs) float32.
    """
    values = _rows(x, up, up_bias, neurons)
    if gate is not None:
        values = values * ACTIVATIONS[activation](_rows(x, gate, gate_bias, neurons))
    elif gated is not None:
        values = values * gated.float()
    else:
        values = ACTIVATIONS[activation](values)
    return values @ down.index_select(0, neurons).float()


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None, neurons: Tensor) -> Tensor:
    """The listed neurons' sums, (B, K) float32."""
    picked = None if bias is None else bias.index_select(0, neurons).float()
    return F.linear(x.float(), weight.index_select(0, neurons).float(), picked)
