"""Training stops at the first loss or gradient that is not a number, and says whose it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cveff.errors import TrainingError
from cveff.train.sharded import local


def require_finite(
    losses: Sequence[Tensor],
    module: nn.Module,
    *,
    step: int,
    learning_rate: float,
    images: Tensor | None = None,
    kept: str = "",
) -> None:
    """Check the losses of the last steps and, where they are finite, the gradients still on `module`'s parameters.

    Args:
        losses: scalars, the last one that of `step`.
        images: (N, C, H, W), on which the first layer is looked for whose output is not finite.
        kept: what is left of the run, for the message.

    Raises:
        TrainingError: one is not finite. Of a loss the step and the layer are named, of gradients the first parameter.
    """
    advice = (
        f"lower train.learning_rate (now {learning_rate:g}), set train.clip_norm, or use precision fp32{kept}"
    )
    values = torch.stack(list(losses)).tolist()
    good = torch.isfinite(torch.tensor(values)).tolist()
    if not all(good):
        first = good.index(False)
        where = "" if images is None else _first_not_finite(module, images)
        raise TrainingError(
            f"the loss became {values[first]} at step {step - len(values) + 1 + first}{where}; {advice}"
        )
    gradients = {name: local(item.grad) for name, item in module.named_parameters() if item.grad is not None}
    if not gradients:
        return
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(gradients.values()))])
    bad = ~torch.isfinite(norms)
    if bool(bad.any()):
        names = [name for name, is_bad in zip(gradients, bad.tolist(), strict=True) if is_bad]
        others = f" and of {len(names) - 1} more" if len(names) > 1 else ""
        raise TrainingError(
            f"the gradient of {names[0]}{others} is not finite at step {step}, though the loss is "
            f"({values[-1]:g}); {advice}"
        )


def _first_not_finite(module: nn.Module, images: Tensor) -> str:
    """The layer that first answers with something that is no number, as a part of a sentence; "" if none does."""
    found: list[str] = []

    def look(name: str, layer: nn.Module, output: object) -> None:
        if found or not isinstance(output, Tensor) or bool(torch.isfinite(output).all()):
            return
        own = all(bool(torch.isfinite(value).all()) for value in layer.parameters())
        found.append(
            f", first in the output of {name}" + ("" if own else ", whose weights no longer are numbers")
        )

    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: look(name, layer, output))
        for name, layer in module.named_modules()
        if not any(True for _ in layer.children())
    ]
    try:
        with torch.no_grad():
            module(images)
    finally:
        for handle in handles:
            handle.remove()
    return "".join(found)
