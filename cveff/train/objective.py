"""`Objective`: what one training step minimises and what it keeps true; by default cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F


class Objective(Protocol):
    """What `fit` minimises.

    Attributes:
        extra: what is trained and saved beside the network (adapters) or only saved (masks, as buffers), and is
            thrown away at the end; None: nothing. `fit` moves it to the run's device.
    """

    extra: nn.Module | None

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The loss summed over the images, a scalar. Called under the run's autocast: cast logits to float first.

        Args:
            module: the network in training mode.
            images: (N, C, H, W) float, normalised, on the run's device; a part of a batch under accumulation.
            targets: (N,) int64, or (N, classes) float under mixup and cutmix.
        """
        ...

    def after_step(self, module: nn.Module, step: int, total_steps: int) -> None:
        """Put back what an update must not change, such as zeros.

        Called after optimizer step `step` (from 1) on the network, then with the same step on its moving average
        where there is one.
        """
        ...

    def identity(self) -> Mapping[str, Any]:
        """Settings, as JSON values, without which a state to resume from does not fit."""
        ...


class CrossEntropy:
    """Cross-entropy with label smoothing; a base for objectives that change a part of it.

    Args:
        label_smoothing: share of the target spread over all classes.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing
        self.extra: nn.Module | None = None

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of `module`'s logits, summed over the images."""
        return self.of_logits(module(images), targets)

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits (N, classes), summed over the images."""
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing, reduction="sum")

    def after_step(self, module: nn.Module, step: int, total_steps: int) -> None:
        """Nothing to put back."""

    def identity(self) -> Mapping[str, Any]:
        """Nothing beyond the settings of `Train`."""
        return {}


@runtime_checkable
class Constraint(Protocol):
    """An edit whose change of the weights outlives training, such as zeros that stay zero."""

    def constrained(self, objective: Objective, module: nn.Module) -> Objective:
        """`objective`, which also keeps what this edit did to `module`."""
        ...
