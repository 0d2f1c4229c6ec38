"""Attention code that writes its input's width into a reshape, made to take the width that is there.

`B, N, C = x.shape … x.reshape(B, N, C)` assumes that the heads together are as wide as the embedding, which pruning
ends. A flexible module runs its own forward; only where the sizes it names cannot hold the tensor is the last one
taken from the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_RESHAPES = (torch.Tensor.reshape, torch.Tensor.view, torch.reshape)


class _LastSizeFollows(TorchFunctionMode):
    """Reshapes whose sizes do not fit infer the last one."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _RESHAPES and len(args) > 1:
            tensor, sizes = args[0], args[1:]
            if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, torch.Size)):
                sizes = tuple(sizes[0])
            if (
                all(isinstance(size, int) and size > 0 for size in sizes)
                and math.prod(sizes) != tensor.numel()
            ):
                return (
                    func(tensor, *sizes[:-1], -1)
                    if func is not torch.reshape
                    else func(tensor, (*sizes[:-1], -1))
                )
        return func(*args, **(kwargs or {}))


class Flexible:
    """Mixed into a module's class by `make_flexible`."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The module's own forward, with reshapes that follow the tensor."""
        with _LastSizeFollows():
            return super().forward(*arguments, **options)  # type: ignore[misc]


def make_flexible(module: nn.Module, path: str) -> nn.Module:
    """Make one submodule of `module` flexible, in place; parameters and paths stay as they were."""
    inner = module.get_submodule(path)
    if not isinstance(inner, Flexible):
        kind = type(inner)
        inner.__class__ = type(f"Flexible{kind.__name__}", (Flexible, kind), {})
    return module
