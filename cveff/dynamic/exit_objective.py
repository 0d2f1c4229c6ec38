"""`ExitObjective`: what training minimises for a network with exits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.compress.distill_losses import soft_targets
from cveff.dynamic.exits import with_exits
from cveff.errors import StepError
from cveff.train.objective import Objective

Method = Literal["joint", "distill"]


class ExitSettings(Protocol):
    """How exits are trained; see `EarlyExit`."""

    @property
    def method(self) -> str: ...
    @property
    def alpha(self) -> float: ...
    @property
    def temperature(self) -> float: ...


def check_settings(kind: str, settings: ExitSettings) -> None:
    """
    Raises:
        StepError: a setting is out of range; the message starts with its key.
    """
    if settings.method not in get_args(Method):
        raise StepError(f"{kind}.method is {settings.method!r}; give one of {', '.join(get_args(Method))}")
    if not 0 <= settings.alpha <= 1:
        raise StepError(f"{kind}.alpha is {settings.alpha!r}; give a number from 0 to 1")
    if not 0 < settings.temperature < float("inf"):
        raise StepError(f"{kind}.temperature is {settings.temperature!r}; give a positive number")


class ExitObjective:
    """The last exit's loss, and each early exit's with the same weight (MSDNet: Huang et al., ICLR 2018, section 4).

    "joint": cross-entropy with the targets. "distill": `(1 - α) · cross-entropy + α T² KL(last ‖ exit)`, the last
    exit's logits without a gradient (Be Your Own Teacher: Zhang et al., ICCV 2019, equation 4 without its hint loss).

    Args:
        last: what is minimised for the last exit.
        settings: the edit.
    """

    def __init__(self, last: Objective, settings: ExitSettings) -> None:
        self._last, self._settings = last, settings
        self._smoothing = float(getattr(last, "label_smoothing", 0.0))
        self.extra = last.extra

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Summed over the images and the exits."""
        seen: list[Tensor] = []
        hook = module.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
        try:
            with with_exits(module, "the network").keeping() as early:
                total = self._last.loss(module, images, targets)
        finally:
            hook.remove()
        for logits in early:
            total = total + self._early(logits.float(), seen[-1].float(), targets)
        return total

    def after_step(self, module: nn.Module, step: int, total_steps: int) -> None:
        """The last exit's objective's."""
        self._last.after_step(module, step, total_steps)

    def identity(self) -> Mapping[str, Any]:
        """The last exit's objective's; the exits' settings are in the model's edits."""
        return self._last.identity()

    def _early(self, logits: Tensor, last: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, targets, label_smoothing=self._smoothing, reduction="sum")
        if self._settings.method == "joint":
            return loss
        alpha, temperature = self._settings.alpha, self._settings.temperature
        imitation: torch.Tensor = soft_targets(logits, last, temperature)
        return (1 - alpha) * loss + alpha * imitation
