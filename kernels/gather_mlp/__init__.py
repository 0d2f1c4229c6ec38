"""The MLP of some of its neurons: y = Σ act(gateₖ·x) (upₖ·x) downₖ over the k that are listed.

Deja Vu (Liu et al., arXiv:2310.17157, section 4.2) reads only the rows of neurons that a token needs. Every matrix lies
neuron by neuron: `down` is the transpose of a linear layer's weight, so that a neuron is a row of it too. One token (or
a few) at a time: the weights are read once, and nothing is copied.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cveff.errors import KernelError
from cveff.kernels.build import library
from cveff.kernels.call import call, check_index, gathered, row_major
from cveff.kernels.choice import Choice, Implementation, choose
from cveff.kernels.gather_mlp import reference

__all__ = ["ACTIVATIONS", "choice", "gather_mlp"]

ACTIVATIONS = tuple(reference.ACTIVATIONS)
SOURCE = Path(__file__).parent / "cpu.cpp"
_TRITON_BATCH = 16


def gather_mlp(
    x: Tensor,
    neurons: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    gate: Tensor | None = None,
    gated: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    implementation: Implementation | None = None,
) -> Tensor:
    """The listed neurons' share of an MLP's output; with all of them, the MLP.

    Args:
        x: (B, inputs) or (inputs,), float.
        neurons: (K,) int32 or int64, which neurons; K may be 0.
        up, gate: (H, inputs), of `x`'s type. Without a gate the MLP is down(act(up(x))), as in OPT.
        down: (H, outputs), the transpose of the layer's weight.
        gated: (B, K), act(gate(x)) of the listed neurons where it is known already, instead of `gate`.
        up_bias, gate_bias: (H,).
        down_bias: (outputs,), added whole.
        activation: one of `ACTIVATIONS`.
        implementation: by default the fastest that can run; `choice` says which and why.

    Returns:
        (B, outputs) or (outputs,), of `x`'s type; sums are float32.

    Raises:
        KernelError: shapes or types do not fit, a neuron's number is none of 0…H-1 (checked on CPUs only), the
            activation is unknown, or the implementation asked for cannot run.
    """
    flat = x if x.dim() == 2 else x[None]
    _check(x, flat, neurons, up, down, gate, gated, (up_bias, gate_bias, down_bias), activation)
    chosen = choice(x, up, down, gate, implementation=implementation).implementation
    given = (up, down, gate, gated, up_bias, gate_bias, activation)
    if len(neurons) == 0 or len(flat) == 0:
        found = flat.new_zeros(len(flat), down.shape[1], dtype=torch.float32)
    elif chosen == "reference":
        found = reference.gather_mlp(flat, neurons, *given)
    elif chosen == "triton":
        from cveff.kernels.gather_mlp import triton

        contiguous = None if gated is None else gated.contiguous()
        found = triton.gather_mlp(
            flat.contiguous(),
            neurons.contiguous(),
            up,
            down,
            gate,
            contiguous,
            up_bias,
            gate_bias,
            activation,
        )
    else:
        found = _cpu(flat, neurons, *given)
    if down_bias is not None:
        found = found + down_bias.float()
    return found.to(x.dtype).reshape(*x.shape[:-1], down.shape[1])


def choice(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    *,
    implementation: Implementation | None = None,
) -> Choice:
    """Which implementation `gather_mlp` takes for these, and why.

    Raises:
        KernelError: as `gather_mlp`.
    """
    weights = [up, down] if gate is None else [up, down, gate]
    found = choose([x, *weights], SOURCE, implementation)
    reason = None
    if found.implementation != "reference" and not all(row_major(weight) for weight in weights):
        reason = "a weight's rows are not contiguous; the kernels read whole rows"
    elif found.implementation == "triton" and x.dim() == 2 and len(x) > _TRITON_BATCH:
        reason = f"{len(x)} tokens; Triton's kernel keeps at most {_TRITON_BATCH}"
    if reason is None:
        return found
    if implementation is not None:
        raise KernelError(f"the {implementation} kernel cannot run: {reason}")
    return Choice("reference", reason)


def _cpu(
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
    compiled = library(SOURCE)
    assert compiled is not None  # `choice` built it
    threads, outputs = torch.get_num_threads(), down.shape[1]
    inputs = x.float().contiguous()
    listed = neurons.to(torch.int32).contiguous()
    biases = gathered(gate_bias, neurons), gathered(up_bias, neurons)
    known = None if gated is None else gated.float().contiguous()
    partial = torch.empty(threads, len(x), outputs)
    y = torch.zeros(len(x), outputs)
    call(
        compiled.gather_mlp,
        *(up.dtype == torch.bfloat16, inputs, len(x), x.shape[1], listed, len(listed)),
        *(gate, 0 if gate is None else gate.stride(0), biases[0], known),
        *(up, up.stride(0), biases[1], down, down.stride(0), outputs),
        *(ACTIVATIONS.index(activation), partial, y, threads),
    )
    return y


def _check(
    x: Tensor,
    flat: Tensor,
    neurons: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    gated: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise KernelError(f"activation is {activation!r}; give one of {', '.join(ACTIVATIONS)}")
    if gate is not None and gated is not None:
        raise KernelError("gate and gated are both given; give one of them")
    if x.dim() not in (1, 2) or up.dim() != 2 or down.dim() != 2:
        raise KernelError(
            f"x, up and down have {x.dim()}, {up.dim()} and {down.dim()} dimensions; give 1 or 2, 2, 2"
        )
    hidden = len(up)
    wanted = {
        "up": (up, (hidden, flat.shape[1])),
        "gate": (gate, (hidden, flat.shape[1])),
        "down": (down, (hidden, down.shape[1])),
        "gated": (gated, (len(flat), len(neurons))),
        "up_bias": (biases[0], (hidden,)),
        "gate_bias": (biases[1], (hidden,)),
        "down_bias": (biases[2], (down.shape[1],)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise KernelError(
                f"{name} is {tuple(tensor.shape)}, and {shape} is wanted for x {tuple(x.shape)} and {hidden} neurons"
            )
    for name, tensor in (("up", up), ("down", down), ("gate", gate)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise KernelError(f"{name} is {tensor.dtype} and x is {x.dtype}; give both in one type")
    check_index("neurons", neurons, hidden)
