"""Which parameters a network multiplies its activations with, in the order of computation, and what they meet.

Found by watching `conv2d` and `linear` themselves: a weight that is standardised or normalised on its way (NFNets,
weight norm) is no parameter there, so zeros put into it would not stay zeros, and it is rightly not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass
class WeightCall:
    """What is known of one weight.

    Attributes:
        parameter: its path in the state dict.
        groups: of the convolution; 1 for a linear layer.
        squares: (input channels,) float64, the sum of squares of each input channel over images and positions.
    """

    parameter: str
    groups: int
    squares: Tensor

    def input_norms(self, weight: Tensor) -> Tensor:
        """‖x‖₂ of the input channel that each weight is multiplied with, broadcastable to `weight` (out, in, …)."""
        norms = self.squares.sqrt().float().view(self.groups, 1, -1)  # (groups, 1, in)
        norms = norms.expand(-1, len(weight) // self.groups, -1).reshape(len(weight), -1)  # (out, in)
        return norms.view(*norms.shape, *(1,) * (weight.ndim - 2))


@torch.no_grad()
def weight_calls(module: nn.Module, batches: Iterable[Tensor]) -> dict[str, WeightCall]:
    """Run `module` in evaluation mode and watch; keys are parameters' paths, in the order of their first use.

    Args:
        batches: normalised images (N, C, H, W) on the module's device.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    watch = _Watch(names)
    was_training = module.training
    module.eval()
    try:
        with watch:
            for images in batches:
                module(images)
    finally:
        module.train(was_training)
    return watch.calls


class _Watch(TorchFunctionMode):
    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self.calls: dict[str, WeightCall] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.conv2d, torch.conv2d, F.linear):
            self._note(func is F.linear, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, is_linear: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        name = self._names.get(id(args[1] if len(args) > 1 else kwargs["weight"]))
        if name is None:
            return
        groups = 1 if is_linear else args[6] if len(args) > 6 else kwargs.get("groups", 1)
        across = tuple(range(x.ndim - 1)) if is_linear else (0, 2, 3)
        squares = x.double().square().sum(across)
        if name in self.calls:
            self.calls[name].squares += squares
        else:
            self.calls[name] = WeightCall(name, groups, squares)
