"""`analyze`: a network's groups of channels, each tried and proven before it is offered."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from cveff.compress.groups import Analysis, find_groups
from cveff.compress.oracle import zeroed
from cveff.compress.ownership import Attention, Ownership
from cveff.compress.trace import trace
from cveff.errors import CveffError
from cveff.measure.parity import relative_difference
from cveff.runtime.errors import first_line
from cveff.runtime.input_spec import InputSpec

TOLERANCE = 1e-4
"""Largest accepted max|pruned - zeroed| / max|zeroed| of the logits in float32."""


def analyze(module: nn.Module, spec: InputSpec, attention: Attention = "heads", seed: int = 0) -> Analysis:
    """Find what can be pruned from a network, and prove it.

    Half of every group is cut from a copy, which has to run and to compute what the dense network computes with
    those channels at zero. Groups that fail (code that holds a size in a way we do not see) are frozen and named.

    Args:
        module: the network; left as it was.
        attention: what one unit of attention is: a head, or one dimension of every head.
        seed: of the channels and images the proof uses.

    Raises:
        StepError: the network cannot be exported.
    """
    ownership = Ownership(trace(module, spec), attention)
    refused: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    like = next(module.parameters())
    images = torch.randn(1, spec.channels, *spec.size, generator=generator).to(like)
    while True:
        analysis = find_groups(ownership, refused)
        failing = _failing(analysis, module, images, np.random.default_rng(seed))
        if not failing:
            return analysis
        refused |= failing


def check(module: nn.Module, analysis: Analysis, keep: dict[str, np.ndarray], images: torch.Tensor) -> float:
    """Relative difference between the pruned network and the dense one with those channels at zero.

    Args:
        module: the dense network; left as it was.
        keep: group name -> bool (size,).
        images: (N, C, H, W) float, normalised.

    Returns:
        max|pruned - zeroed| / max|zeroed| over the logits.
    """
    small = analysis.edit(keep, module).apply(copy.deepcopy(module)).eval()
    with torch.no_grad():
        logits = small(images)
    return relative_difference(logits.cpu().numpy(), zeroed(analysis, keep, images).cpu().numpy())


def _failing(
    analysis: Analysis, module: nn.Module, images: torch.Tensor, random: np.random.Generator
) -> dict[str, str]:
    """Names of groups whose cut does not hold, with the reason; halved until single groups are found."""
    keep = {group.name: _half(group.size, random) for group in analysis.groups}
    failing: dict[str, str] = {}
    pending: list[dict[str, np.ndarray]] = [keep] if keep else []
    while pending:
        chosen = pending.pop()
        reason = _objection(module, analysis, chosen, images)
        if reason is None:
            continue
        if len(chosen) == 1:
            failing[next(iter(chosen))] = reason
            continue
        items = list(chosen.items())
        middle = len(items) // 2
        pending += [dict(items[:middle]), dict(items[middle:])]
    if not failing and keep and _objection(module, analysis, keep, images) is not None:
        # Each holds alone but not together: give up the later half rather than guess.
        items = list(keep)
        return dict.fromkeys(items[len(items) // 2 :], "it cannot be cut together with other groups")
    return failing


def _half(size: int, random: np.random.Generator) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[random.permutation(size)[: max(1, size // 2)]] = True
    return mask


def _objection(
    module: nn.Module, analysis: Analysis, keep: dict[str, np.ndarray], images: torch.Tensor
) -> str | None:
    try:
        difference = check(module, analysis, keep, images)
    except CveffError:
        raise
    except Exception as error:  # whatever the network's own code raises on the new sizes
        return f"the network does not run without it: {first_line(error)[:200]}"
    if not difference <= TOLERANCE:
        return f"without it the network differs from the dense one by {difference:.1e}"
    return None


def describe(analysis: Analysis) -> dict[str, Any]:
    """What may be pruned and what may not, as plain JSON values."""
    return {
        "groups": {group.name: group.size for group in analysis.groups},
        "frozen": {group.name: {"size": group.size, "reason": group.reason} for group in analysis.frozen},
    }
