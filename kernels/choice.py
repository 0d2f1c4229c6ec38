"""Which implementation of an operation runs, and why: what every dispatcher answers when asked."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cveff.errors import KernelError
from cveff.kernels.build import library

Implementation = Literal["reference", "cpu", "triton"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "cpu", "triton")
CPU_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason for it.

    Attributes:
        implementation: "reference" (plain PyTorch), "cpu" (C++) or "triton".
        reason: a sentence for people.
    """

    implementation: Implementation
    reason: str


def choose(tensors: Sequence[Tensor], source: Path, wanted: Implementation | None = None) -> Choice:
    """The implementation for these tensors: that which is `wanted`, or the fastest that can run.

    Args:
        tensors: the operation's floating-point inputs.
        source: its C++ file; the Triton kernels are asked for by device alone.

    Raises:
        KernelError: tensors on different devices, an unknown implementation, or one that cannot run here.
    """
    if wanted is not None and wanted not in IMPLEMENTATIONS:
        raise KernelError(f"implementation is {wanted!r}; give one of {', '.join(IMPLEMENTATIONS)}")
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise KernelError(
            f"tensors lie on {' and '.join(sorted(map(str, devices)))}; move them to one device"
        )
    if wanted == "reference":
        return Choice("reference", "it was asked for")
    found = _fastest(tensors, source, wanted)
    if wanted is not None and found.implementation != wanted:
        raise KernelError(f"the {wanted} kernel cannot run: {found.reason}")
    return found


def _fastest(tensors: Sequence[Tensor], source: Path, wanted: Implementation | None) -> Choice:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return Choice("reference", "a gradient is recorded, and the kernels have none; use torch.no_grad()")
    device = tensors[0].device.type
    dtypes = {tensor.dtype for tensor in tensors}
    if device == "cuda" or wanted == "triton":
        if unknown := dtypes - set(TRITON_DTYPES):
            return Choice("reference", f"Triton's kernel has no {_names(unknown)}")
        if importlib.util.find_spec("triton") is None:
            return Choice("reference", "Triton is not installed")
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return Choice("reference", f"Triton needs a GPU, and the tensors lie on {device}")
        return Choice(
            "triton", "the tensors lie on a GPU" if device == "cuda" else "Triton's interpreter runs"
        )
    if device != "cpu":
        return Choice("reference", f"there is no kernel for {device}")
    if unknown := dtypes - set(CPU_DTYPES):
        return Choice("reference", f"the C++ kernel has no {_names(unknown)}")
    if library(source) is None:
        return Choice("reference", "the C++ kernel could not be built; the log says why")
    return Choice("cpu", "the tensors lie in memory, and the C++ kernel has their type")


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
