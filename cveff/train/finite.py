"""Training stops at the first loss or gradient that is not a number, and says whose it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cveff.errors import TrainingError


def require_finite(loss: Tensor, module: nn.Module, *, step: int, learning_rate: float) -> None:
    """Check a step's loss and, where the loss is finite, the gradients that are still on `module`'s parameters.

    Raises:
        TrainingError: one is not finite; of gradients, the first parameter is named.
    """
    advice = f"lower train.learning_rate (now {learning_rate:g}), set train.clip_norm, or use precision fp32"
    if not math.isfinite(float(loss)):
        raise TrainingError(f"the loss became {float(loss)} at step {step}; {advice}")
    gradients = {name: item.grad for name, item in module.named_parameters() if item.grad is not None}
    if not gradients:
        return
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(gradients.values()))])
    bad = ~torch.isfinite(norms)
    if bool(bad.any()):
        names = [name for name, is_bad in zip(gradients, bad.tolist(), strict=True) if is_bad]
        others = f" and of {len(names) - 1} more" if len(names) > 1 else ""
        raise TrainingError(
            f"the gradient of {names[0]}{others} is not finite at step {step}, though the loss is "
            f"({float(loss):g}); {advice}"
        )
