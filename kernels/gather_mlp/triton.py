"""The MLP of some neurons on a GPU, in two launches: neurons' values, then the sum of their rows in parts.

Rows are read once a launch; the batch lies in registers, so it is small (`MAX_BATCH`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BATCH = 16
_PARTS = 128
_BLOCK = 4096
"""Elements of the widest block, batch × neurons × inputs."""


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    else:
        return x


@triton.jit
def _values(
    x, neurons, gate, gated, up, gate_bias, up_bias, values,
    batch, inputs, kept, gate_stride, up_stride,
    HAS_GATE: tl.constexpr, HAS_GATED: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BATCH: tl.constexpr, NEURONS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    here = place < kept
    neuron = tl.load(neurons + place, here, other=0).to(tl.int64)
    image = tl.arange(0, BATCH)
    # Summed over columns once, at the end: a sum in every step would make all threads wait for one another.
    up_parts = tl.zeros([BATCH, NEURONS, INPUTS], tl.float32)
    gate_parts = tl.zeros([BATCH, NEURONS, INPUTS], tl.float32)
    for start in range(0, inputs, INPUTS):
        column = start + tl.arange(0, INPUTS)
        inside = here[:, None] & (column < inputs)[None, :]
        part = tl.load(
            x + image[:, None] * inputs + column[None, :],
            (image < batch)[:, None] & (column < inputs)[None, :],
            other=0.0,
        ).to(tl.float32)
        row = tl.load(up + neuron[:, None] * up_stride + column[None, :], inside, other=0.0).to(tl.float32)
        up_parts += part[:, None, :] * row[None, :, :]
        if HAS_GATE:
            row = tl.load(gate + neuron[:, None] * gate_stride + column[None, :], inside, other=0.0)
            gate_parts += part[:, None, :] * row.to(tl.float32)[None, :, :]
    up_sum = tl.sum(up_parts, axis=2)
    if HAS_UP_BIAS:
        up_sum += tl.load(up_bias + neuron, here, other=0.0).to(tl.float32)[None, :]
    mask = (image < batch)[:, None] & here[None, :]
    offset = image[:, None] * kept + place[None, :]
    if HAS_GATE:
        gate_sum = tl.sum(gate_parts, axis=2)
        if HAS_GATE_BIAS:
            gate_sum += tl.load(gate_bias + neuron, here, other=0.0).to(tl.float32)[None, :]
        found = up_sum * _activate(gate_sum, ACTIVATION)
    elif HAS_GATED:
        found = up_sum * tl.load(gated + offset, mask, other=0.0).to(tl.float32)
    else:
        found = _activate(up_sum, ACTIVATION)
    tl.store(values + offset, found, mask)


@triton.jit
def _rows(
    values, neurons, down, partial,
    batch, outputs, kept, down_stride, part_size,
    BATCH: tl.constexpr, NEURONS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(1)
    image = tl.arange(0, BATCH)
    parts = tl.zeros([BATCH, NEURONS, OUTPUTS], tl.float32)
    first = part * part_size
    last = tl.minimum(first + part_size, kept)
    for start in range(first, last, NEURONS):
        place = start + tl.arange(0, NEURONS)
        here = place < last
        neuron = tl.load(neurons + place, here, other=0).to(tl.int64)
        value = tl.load(
            values + image[:, None] * kept + place[None, :],
            (image < batch)[:, None] & here[None, :],
            other=0.0,
        )
        row = tl.load(
            down + neuron[:, None] * down_stride + column[None, :],
            here[:, None] & (column < outputs)[None, :],
            other=0.0,
        ).to(tl.float32)
        parts += value[:, :, None] * row[None, :, :]
    found = tl.sum(parts, axis=1)
    mask = (image < batch)[:, None] & (column < outputs)[None, :]
    tl.store(partial + (part * batch + image[:, None]) * outputs + column[None, :], found, mask)


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
    """As the reference; `x`, `neurons` and `gated` are contiguous, and so are the weights' rows.

    Returns:
        (B, outputs) float32.
    """
    batch, inputs = x.shape
    kept, outputs = len(neurons), down.shape[1]
    values = torch.empty(batch, kept, device=x.device, dtype=torch.float32)
    padded = triton.next_power_of_2(batch)
    columns = min(512, triton.next_power_of_2(inputs))
    rows = max(1, _BLOCK // (columns * padded))
    _values[(triton.cdiv(kept, rows),)](
        x, neurons, _or(gate, x), _or(gated, x), up, _or(gate_bias, x), _or(up_bias, x), values,
        batch, inputs, kept, 0 if gate is None else gate.stride(0), up.stride(0),
        HAS_GATE=gate is not None, HAS_GATED=gated is not None,
        HAS_GATE_BIAS=gate_bias is not None, HAS_UP_BIAS=up_bias is not None,
        ACTIVATION=activation, BATCH=padded, NEURONS=rows, INPUTS=columns,
    )  # fmt: skip
    width = min(256, triton.next_power_of_2(outputs))
    rows = max(1, _BLOCK // (width * padded))
    parts = max(1, min(_PARTS, kept // rows))
    part_size = triton.cdiv(kept, parts * rows) * rows
    parts = triton.cdiv(kept, part_size)
    partial = torch.empty(parts, batch, outputs, device=x.device, dtype=torch.float32)
    _rows[(triton.cdiv(outputs, width), parts)](
        values, neurons, down, partial,
        batch, outputs, kept, down.stride(0), part_size,
        BATCH=padded, NEURONS=rows, OUTPUTS=width,
    )  # fmt: skip
    return partial.sum(0)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor to point to where there is none; it is not read."""
    return other if tensor is None else tensor
