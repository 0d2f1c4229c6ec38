"""Floating-point operations of training, counted as they run."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cveff.runtime.input_spec import InputSpec

_IMAGES = 2


def training_flops(module: nn.Module, spec: InputSpec) -> float:
    """Operations of one image's forward and backward pass, a multiplication and an addition each counting one.

    Counted are convolutions, matrix products and attention. What needs no gradient (`requires_grad` off, with nothing
    before it that has) costs none. `module` is left as it was, its gradients and statistics too.

    Args:
        spec: what images look like; the count depends on their size.
    """
    parameter = next(module.parameters())
    images = torch.zeros(_IMAGES, spec.channels, *spec.size, device=parameter.device, dtype=parameter.dtype)
    training = module.training
    gradients = {name: item.grad for name, item in module.named_parameters()}
    # Evaluation mode computes the same products and leaves batch norms' statistics and torch's generator alone.
    module.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.enable_grad():
            made = module(images)
            if made.requires_grad:
                made.sum().backward()
    finally:
        module.train(training)
        for name, item in module.named_parameters():
            item.grad = gradients[name]
    return counter.get_total_flops() / _IMAGES
