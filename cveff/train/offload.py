"""Optimizer state in the CPU's memory while the network is on a GPU (ZeRO-Offload, Ren et al., arXiv:2101.06840)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cveff.errors import TrainingError
from cveff.train.optimizers import ScheduledOptimizers, build_optimizer

if TYPE_CHECKING:
    from cveff.train.train import Train


class OffloadedOptimizers:
    """`ScheduledOptimizers` over copies of the weights on the CPU: gradients go there, weights come back.

    Args:
        module, extra: what is trained, on any device.
        build: makes the optimizers of the copies.
    """

    def __init__(
        self,
        module: nn.Module,
        extra: nn.Module,
        build: Callable[[nn.Module, nn.Module], ScheduledOptimizers],
    ) -> None:
        self._live = [*module.parameters(), *extra.parameters()]
        # Parameters are taken from `copies`, so the network never exists twice on the GPU.
        copies: dict[int, Any] = {
            id(item): nn.Parameter(_host(item), requires_grad=item.requires_grad) for item in self._live
        }
        self._copies = [copies[id(item)] for item in self._live]
        self._inner = build(copy.deepcopy(module, dict(copies)), copy.deepcopy(extra, dict(copies)))
        self.optimizers = self._inner.optimizers
        self.set_factor, self.state_dict = self._inner.set_factor, self._inner.state_dict
        self.close = self._inner.close

    def step(self) -> None:
        """Update the copies by the live gradients, then the live weights."""
        for live, held in zip(self._live, self._copies, strict=True):
            held.grad = None if live.grad is None else _host(live.grad)
        self._inner.step()
        self._inner.zero_grad()
        with torch.no_grad():
            for live, held in zip(self._live, self._copies, strict=True):
                live.copy_(held, non_blocking=True)

    def zero_grad(self) -> None:
        for live in self._live:
            live.grad = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state; the copies become what the live weights are by now."""
        self._inner.load_state_dict(state)
        with torch.no_grad():
            for live, held in zip(self._live, self._copies, strict=True):
                held.copy_(live)


def choose_optimizers(
    module: nn.Module, extra: nn.Module, settings: Train, device: torch.device
) -> ScheduledOptimizers | OffloadedOptimizers:
    """What `settings` say, on `device` or in the CPU's memory.

    Raises:
        TrainingError: the state is to leave a GPU, and `device` is none; or see `GaLore.optimizer`.
    """

    def build(module: nn.Module, extra: nn.Module) -> ScheduledOptimizers:
        return build_optimizer(
            module,
            settings.optimizer,
            settings.peak_learning_rate,
            settings.weight_decay,
            settings.momentum,
            extra,
            settings.galore,
        )

    if not settings.offload_optimizer:
        return build(module, extra)
    if device.type == "cpu":
        raise TrainingError(
            "train.offload_optimizer moves the optimizer's state from a GPU to the CPU's memory, and the device is the "
            "CPU; turn it off"
        )
    return OffloadedOptimizers(module, extra, build)


def _host(value: torch.Tensor) -> torch.Tensor:
    """A copy in the CPU's memory, pinned where it comes from a GPU."""
    held = value.detach().to("cpu", copy=True)
    return held.pin_memory() if value.device.type == "cuda" else held
