"""How much a network needs each unit (channel, head) of a group: one number a unit, comparable within its group.

Every criterion is a function `(module, groups, …) -> {group name: (size,) float64}`, larger meaning more needed;
a unit that does nothing scores 0 with the criteria that look at data. Across groups, `cveff.compress.scopes` makes
the numbers comparable.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from torch import nn

from cveff.compress.importance_activation import activation
from cveff.compress.importance_gradient import hessian, taylor
from cveff.compress.samples import Batches, require_batches
from cveff.compress.units import (
    check_groups,
    finite,
    is_bias,
    parameters_of,
    per_index,
    per_unit,
    zero_scores,
)
from cveff.errors import StepError

if TYPE_CHECKING:
    from cveff.compress.groups import Group

Criterion = Literal["magnitude", "taylor", "hessian", "activation", "random"]

DATA_CRITERIA = ("taylor", "hessian", "activation")
"""Criteria that look at images."""


def score(
    module: nn.Module,
    groups: Sequence[Group],
    criterion: Criterion = "magnitude",
    *,
    batches: Batches | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Importance of every unit of every group. `module` is left as it was.

    Args:
        criterion: "magnitude" (weights only), "taylor" and "hessian" (change of the loss), "activation" (change
            of what the next layers compute), "random" (the baseline that each of them must beat).
        batches: for the criteria in `DATA_CRITERIA`; small batches (8 to 32 images) give "taylor" more terms.
        seed: of "random", and of the labels drawn where images have none.

    Returns:
        group name -> (size,) float64, not negative.

    Raises:
        StepError: an unknown criterion, a criterion that needs images without any, groups of another network,
            or gradients or activations that are not finite (the parameter or module is named).
    """
    if criterion not in get_args(Criterion):
        raise StepError(f"importance {criterion!r} is unknown; known: {', '.join(get_args(Criterion))}")
    check_groups(module, groups)
    if criterion == "magnitude":
        scores = magnitude(module, groups)
    elif criterion == "random":
        scores = random(groups, seed)
    else:
        given = require_batches(batches, f"importance {criterion!r}")
        if criterion == "activation":
            scores = activation(module, groups, given)
        else:
            scores = (taylor if criterion == "taylor" else hessian)(module, groups, given, seed)
    return {name: finite(values, name, criterion) for name, values in scores.items()}


def magnitude(module: nn.Module, groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Mean over the group's weights of ‖weights of the unit‖², each weight's divided by its mean over the units.

    Fang et al., "DepGraph" (CVPR 2023), section 3.3: a channel's producers, consumers and affine scales are judged
    together. Dividing by the mean keeps one large layer from deciding alone. Biases and norm statistics, which
    scale nothing, have no say.
    """
    parameters = parameters_of(module)
    scores = zero_scores(groups)
    for group in groups:
        terms = []
        for member in group.members:
            if member.parameter not in parameters or is_bias(member):
                continue
            squares = per_index(parameters[member.parameter].detach().float().square(), member.dim)
            norms = per_unit(squares, member.units, group.size)
            finite(norms, f"{group.name} ({member.parameter})", "magnitude")
            if norms.mean() > 0:
                terms.append(norms / norms.mean())
        if terms:
            scores[group.name] = np.mean(terms, axis=0)
    return scores


def random(groups: Sequence[Group], seed: int) -> dict[str, np.ndarray]:
    """Uniform in [0, 1), a function of the seed and the group's name alone."""
    return {
        group.name: np.random.default_rng([seed, zlib.crc32(group.name.encode())]).random(group.size)
        for group in groups
    }
