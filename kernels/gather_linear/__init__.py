"""Linear layers of which only some outputs, or some inputs, are wanted: the weight's other rows are not read.

`some_outputs` is the first layer of an MLP whose active neurons are known (Deja Vu, Liu et al., arXiv:2310.17157);
`some_inputs` skips inputs that are nearly zero (TEAL, Liu et al., arXiv:2408.14690) and needs the weight transposed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cveff.errors import KernelError
from cveff.kernels.build import library
from cveff.kernels.call import call, check_index, row_major
from cveff.kernels.choice import Choice, Implementation, choose
from cveff.kernels.gather_linear import reference

__all__ = ["choice", "some_inputs", "some_outputs"]

SOURCE = Path(__file__).parent / "cpu.cpp"


def some_outputs(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """The listed outputs of a linear layer.

    Args:
        x: (B, inputs) float.
        weight: (outputs, inputs), of `x`'s type.
        index: (K,) int32 or int64, which outputs.
        bias: (outputs,).
        implementation: by default the fastest that can run; `choice` says which and why.

    Returns:
        (B, K), of `x`'s type; sums are float32.

    Raises:
        KernelError: shapes or types do not fit, an index is out of range (checked on CPUs only), or the
            implementation asked for cannot run.
    """
    _check(x, weight, index, weight.shape[-1])
    if choice(x, weight, implementation=implementation).implementation == "cpu" and len(index) and len(x):
        compiled = library(SOURCE)
        assert compiled is not None  # `choice` built it
        found = torch.empty(len(x), len(index))
        inputs, listed = x.float().contiguous(), index.to(torch.int32).contiguous()
        call(
            compiled.some_outputs,
            *(weight.dtype == torch.bfloat16, inputs, len(x), x.shape[1], listed, len(listed)),
            *(weight, weight.stride(0), found, torch.get_num_threads()),
        )
    else:
        found = reference.some_outputs(x, weight, index)
    if bias is not None:
        found = found + bias.index_select(0, index).float()
    return found.to(x.dtype)


def some_inputs(
    values: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """What the listed inputs of a linear layer contribute to its output.

    Args:
        values: (B, K) float, the listed inputs.
        weight: (inputs, outputs), the transpose of the layer's weight, of the type of `values`.
        index: (K,) int32 or int64, which inputs they are.
        bias: (outputs,), added whole.
        implementation: as in `some_outputs`.

    Returns:
        (B, outputs), of the type of `values`; sums are float32.

    Raises:
        KernelError: as `some_outputs`.
    """
    _check(values, weight, index, len(index))
    if (
        choice(values, weight, implementation=implementation).implementation == "cpu"
        and len(index)
        and len(values)
    ):
        compiled = library(SOURCE)
        assert compiled is not None  # `choice` built it
        threads, outputs = torch.get_num_threads(), weight.shape[1]
        partial, found = torch.empty(threads, len(values), outputs), torch.zeros(len(values), outputs)
        given, listed = values.float().contiguous(), index.to(torch.int32).contiguous()
        call(
            compiled.some_inputs,
            *(weight.dtype == torch.bfloat16, given, len(values), listed, len(listed)),
            *(weight, weight.stride(0), outputs, partial, found, threads),
        )
    else:
        found = reference.some_inputs(values, weight, index)
    if bias is not None:
        found = found + bias.float()
    return found.to(values.dtype)


def choice(x: Tensor, weight: Tensor, *, implementation: Implementation | None = None) -> Choice:
    """Which implementation runs for these, and why.

    Raises:
        KernelError: as `some_outputs`.
    """
    if implementation == "triton" or (implementation is None and x.device.type == "cuda"):
        reason = "there is no Triton kernel of gather_linear"
        if implementation is not None:
            raise KernelError(f"the triton kernel cannot run: {reason}; leave it out, or give 'reference'")
        return Choice("reference", reason)
    found = choose([x, weight], SOURCE, implementation)
    if found.implementation == "cpu" and not row_major(weight):
        reason = "the weight's rows are not contiguous; the kernel reads whole rows"
        if implementation is not None:
            raise KernelError(f"the cpu kernel cannot run: {reason}")
        return Choice("reference", reason)
    return found


def _check(x: Tensor, weight: Tensor, index: Tensor, width: int) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != width:
        raise KernelError(
            f"x is {tuple(x.shape)} and the weight {tuple(weight.shape)}; give (B, {width}) and a matrix"
        )
    if x.dtype != weight.dtype:
        raise KernelError(f"x is {x.dtype} and the weight {weight.dtype}; give both in one type")
    check_index("index", index, len(weight))
