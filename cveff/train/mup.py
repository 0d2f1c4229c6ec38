"""µP: initial weights and learning rates by which the best learning rate of a narrow network is a wide one's too.

Maximal update parametrization (Yang et al., "Tensor Programs V", arXiv:2203.03466), in the form of its table 3, where
the output's multiplier lies in its initial weights and rate, so that the network itself is the plain one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from cveff.errors import StepError
from cveff.model import Model
from cveff.train.growth.event import Growth
from cveff.train.growth.growing import fresh
from cveff.train.growth.heads import is_attention
from cveff.train.growth.sizes import specs_of
from cveff.train.optimizers import ScheduledOptimizers

_WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Rule = Literal["adamw", "sgd"]


@dataclass(frozen=True)
class Parametrization:
    """What µP makes of each parameter.

    Attributes:
        rates: name -> factor of the learning rate.
        deviations: name -> standard deviation of the initial weights; weights that begin as constants are left out.
    """

    rates: Mapping[str, float]
    deviations: Mapping[str, float]


def parametrization(
    model: Model, base_width: int | tuple[int, ...], rule: Rule, seed: int = 0
) -> Parametrization:
    """Compare `model` with itself at `base_width`, where learning rates are as they are given.

    With m the ratio of a weight's inputs to the base's: hidden weights begin with variance 1/m of the base's and learn
    at 1/m (AdamW), output weights begin with 1/m² and learn at 1/m, what reads the image, biases and scales stay. Under
    SGD hidden weights learn at the ratio of outputs over that of inputs, output weights at 1/m, the rest at the ratio
    of outputs.

    Args:
        base_width: a ViT's embed_dim, or channels of each stage.
        rule: the optimizer's.
        seed: of the base's initial weights, whose deviation is taken over.

    Raises:
        StepError: the architecture has no width, or heads would be of another size at the base's.
    """
    base = fresh(specs_of(model, [_base_event(model, base_width)])[0], seed).module
    before, weights = dict(base.named_parameters()), _weights(model.module)
    rates, deviations = {}, {}
    for name, parameter in model.module.named_parameters():
        if name not in before or before[name].ndim != parameter.ndim:
            raise StepError(
                f"{model.spec.architecture} has no {name} at width {base_width}; choose another base"
            )
        own, theirs = parameter.shape, before[name].shape
        if name not in weights:
            rates[name] = 1.0 if rule == "adamw" else parameter.numel() / before[name].numel()
            continue
        inputs = own[1:].numel() / theirs[1:].numel()
        outputs = own[0] / theirs[0]
        is_output = outputs == 1
        rates[name] = 1 / inputs if rule == "adamw" or is_output else outputs / inputs
        deviation = float(before[name].detach().std()) if before[name].numel() > 1 else 0.0
        if deviation > 0:
            deviations[name] = deviation / (inputs if is_output else inputs**0.5)
    return Parametrization(rates, deviations)


@torch.no_grad()
def initialize(module: nn.Module, parametrization: Parametrization) -> None:
    """Scale `module`'s weights, in place, to µP's deviations."""
    for name, deviation in parametrization.deviations.items():
        weight = module.get_parameter(name)
        if (now := float(weight.std())) > 0:
            weight.mul_(deviation / now)


def with_rates(
    optimizers: ScheduledOptimizers, module: nn.Module, parametrization: Parametrization
) -> ScheduledOptimizers:
    """The same optimizers, before their first step, with µP's learning rates.

    Weight decay is divided by the same factor: what a step takes off a weight does not depend on the width.
    """
    factors = {
        id(parameter): parametrization.rates.get(name, 1.0) for name, parameter in module.named_parameters()
    }
    for optimizer in optimizers.optimizers:
        groups = []
        for group in optimizer.param_groups:
            for factor in sorted({factors.get(id(parameter), 1.0) for parameter in group["params"]}):
                groups.append(
                    {
                        **group,
                        "params": [item for item in group["params"] if factors.get(id(item), 1.0) == factor],
                        "lr": group["lr"] * factor,
                        "weight_decay": group["weight_decay"] / factor,
                    }
                )
        optimizer.param_groups[:] = groups
    return ScheduledOptimizers(optimizers.optimizers)


def _base_event(model: Model, width: int | tuple[int, ...]) -> Growth:
    attention: Any = next((part for part in model.module.modules() if is_attention(part)), None)
    if attention is None:
        return Growth(at=0, width=width)
    head_dim = int(attention.head_dim)
    if not isinstance(width, int) or width % head_dim:
        raise StepError(
            f"µP's base width {width!r} is no multiple of {head_dim}, the dimension of a head, which must be the "
            "same at every width; give one that is"
        )
    return Growth(at=0, width=width, heads=width // head_dim)


def _weights(module: nn.Module) -> set[str]:
    return {
        f"{path}.weight" if path else "weight"
        for path, part in module.named_modules()
        if isinstance(part, _WEIGHTS)
    }
