"""Importance as the expected change of the loss: first order (Taylor) and second (Optimal Brain Damage)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.compress.samples import Batches, evaluation, forget, labels_of
from cveff.compress.units import device_of, parameters_of, per_index, per_unit, zero_scores
from cveff.errors import StepError

if TYPE_CHECKING:
    from cveff.compress.groups import Group

FISHER_PART = 4
"""Images a squared gradient is taken of at once: nearer to one, nearer to the Fisher; larger, faster."""


def taylor(module: nn.Module, groups: Sequence[Group], batches: Batches, seed: int) -> dict[str, np.ndarray]:
    """sqrt of the mean over batches of (Σ gradient · weight over the unit's own weights)².

    Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019), equation 8, with the joint sum
    over everything that produces or scales the unit (roles "out" and "scale"): their contributions may cancel, as
    they do when the whole group is removed. Batch norms use their running statistics.
    """
    totals = zero_scores(groups)
    names = _trained(module, groups, ("out", "scale"))
    weights = parameters_of(module)
    for gradients, _ in _gradients(module, names, batches, seed):
        for group in groups:
            change = np.zeros(group.size)
            for member in group.members:
                if member.role != "in" and member.parameter in gradients:
                    product = gradients[member.parameter] * weights[member.parameter].detach()
                    change += per_unit(per_index(product, member.dim), member.units, group.size)
            totals[group.name] += change**2
    return {name: np.sqrt(total / len(batches)) for name, total in totals.items()}


def hessian(module: nn.Module, groups: Sequence[Group], batches: Batches, seed: int) -> dict[str, np.ndarray]:
    """Σ ½ · weight² · E[gradient²] over all of the unit's weights (every role).

    LeCun et al., "Optimal Brain Damage" (NeurIPS 1990), equation 5, the Hessian's diagonal taken as the empirical
    Fisher. Gradients are averaged over parts of `FISHER_PART` images; near a minimum, where images' gradients
    are independent with mean zero, the square of such an average times the part's size is one image's square.
    """
    names = _trained(module, groups, ("out", "in", "scale"))
    weights = parameters_of(module)
    fisher: dict[str, Tensor] = {}
    count = 0
    parts = [
        (images, labels)
        for whole, targets in batches
        for images, labels in zip(
            whole.split(FISHER_PART),
            [None] * -(-len(whole) // FISHER_PART) if targets is None else targets.split(FISHER_PART),
            strict=True,
        )
    ]
    for gradients, size in _gradients(module, names, parts, seed):
        count += size
        for name, gradient in gradients.items():
            # size² · ḡ² = (Σ g)² estimates the part's Σ g²; the last part may be smaller.
            fisher[name] = fisher.get(name, torch.zeros_like(gradient)) + size * size * gradient.square()
    scores = zero_scores(groups)
    for group in groups:
        for member in group.members:
            if member.parameter in fisher:
                saliency = (
                    0.5 * weights[member.parameter].detach().square() * fisher[member.parameter] / count
                )
                scores[group.name] += per_unit(per_index(saliency, member.dim), member.units, group.size)
    return scores


def _trained(module: nn.Module, groups: Sequence[Group], roles: tuple[str, ...]) -> list[str]:
    """Floating-point parameters (no buffers) that are members with one of `roles`."""
    parameters = parameters_of(module)
    names = {member.parameter for group in groups for member in group.members if member.role in roles}
    return sorted(name for name in names if name in parameters and parameters[name].is_floating_point())


def _gradients(
    module: nn.Module, names: Sequence[str], batches: Batches, seed: int
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Per batch: gradient of the mean loss by parameter name, and the number of images.

    Images without classes get one drawn from the network's own probabilities (Kunstner et al., "Limitations of the
    empirical Fisher", NeurIPS 2019): against its own soft predictions the cross-entropy has no gradient at all.
    """
    parameters = parameters_of(module)
    device = device_of(module)
    generator = torch.Generator().manual_seed(seed)
    with evaluation(module), _trainable([parameters[name] for name in names]), torch.enable_grad():
        for images, targets in batches:
            logits = forget(module)(images.to(device)).float()
            labels = labels_of(targets)
            if labels is None:
                probabilities = logits.detach().softmax(dim=1).cpu()
                if not bool(torch.isfinite(probabilities).all()):
                    raise StepError(
                        "the network's logits are not finite on the calibration images; check its weights"
                    )
                labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            elif int(labels.max()) >= logits.shape[1]:
                raise StepError(
                    f"class {int(labels.max())} in the calibration images, but the network has {logits.shape[1]} logits"
                )
            loss = F.cross_entropy(logits, labels.to(device))
            found = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
            gradients = {}
            for name, gradient in zip(names, found, strict=True):
                if gradient is None:
                    continue
                if not bool(torch.isfinite(gradient).all()):
                    raise StepError(
                        f"the gradient of {name} is not finite on the calibration images (loss {loss.item():g}); "
                        "check the weights, or use importance='magnitude'"
                    )
                gradients[name] = gradient.detach()
            yield gradients, len(images)


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
