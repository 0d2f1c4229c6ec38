"""What calls of kernels share: how C++ is given its arguments, and checks that keep a kernel inside its tensors."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from cveff.errors import KernelError


def call(function: Any, *arguments: Tensor | float | None) -> None:
    """Call a kernel: tensors are passed as pointers, None as a null pointer, numbers as int64_t or float."""
    function(*(_converted(argument) for argument in arguments))


def _converted(argument: Tensor | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def gathered(values: Tensor | None, index: Tensor) -> Tensor | None:
    """The listed values as contiguous float32."""
    return None if values is None else values.index_select(0, index).float().contiguous()


def row_major(matrix: Tensor) -> bool:
    """Whether every row of the matrix is contiguous; rows may lie anywhere, as long as forward."""
    return (matrix.stride(1) == 1 or matrix.shape[1] == 1) and matrix.stride(0) >= 0


def check_index(name: str, index: Tensor, size: int) -> None:
    """Raise if these are not numbers from 0 to size - 1; on a GPU, only if they are no numbers.

    Raises:
        KernelError: says which.
    """
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise KernelError(f"{name} is {tuple(index.shape)} {index.dtype}; give (K,) int32 or int64")
    if index.device.type != "cpu" or len(index) == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    if low < 0 or high >= size:
        raise KernelError(f"{name} has {low if low < 0 else high}; there are 0 to {size - 1}")
