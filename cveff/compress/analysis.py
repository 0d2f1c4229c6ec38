"""`analyze`: a network's groups of channels, each tried and proven before it is offered."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cveff.compress.groups import Analysis, Group, find_groups
from cveff.compress.own_calls import own_calls
from cveff.compress.ownership import Attention, Ownership
from cveff.compress.proof import Proof, Trial, awakened, check, light_copy
from cveff.compress.trace import trace
from cveff.runtime.input_spec import InputSpec

__all__ = ["analyze", "check", "describe", "light_copy"]


def analyze(module: nn.Module, spec: InputSpec, attention: Attention = "heads", seed: int = 0) -> Analysis:
    """Find what can be pruned from a network, and prove it.

    Half of every group is cut from a copy, which has to run and to compute what the dense network computes with
    those channels at zero. Groups that fail (code that holds a size in a way we do not see) are frozen and named.

    Args:
        module: the network; left as it was. The proof does not depend on its weights.
        attention: what one unit of attention is: a head, or one dimension of every head.
        seed: of the channels, weights and images the proof uses.

    Raises:
        StepError: the network cannot be exported.
    """
    random = np.random.default_rng(seed)
    like = next(module.parameters())
    images = torch.from_numpy(random.standard_normal((2, spec.channels, *spec.size))).to(like)
    ownership = Ownership(trace(module, spec), attention)
    probe = awakened(module, seed)
    calls = own_calls(light_copy(probe), ownership.trace, images[:1])
    refused: dict[str, str] = {}
    proof = Proof(probe, replace(find_groups(ownership), own_calls=calls), images[:1])
    # Two random draws, since sizes that fit by luck once will not fit again, one of them on a batch, which what was
    # learned from one image must not fix; and halves, since groups of one size then stay of one size.
    for batch, ratio in ((1, None), (2, None), (1, 0.5)):
        proof.images = images[:batch]
        while proof.analysis.groups:
            keep = {group.name: _draw(group.size, random, ratio) for group in proof.analysis.groups}
            proof.repair(keep)
            failing = proof.failing(keep)
            if not failing:
                break
            if not _tie(ownership, proof.analysis, failing):
                refused |= {name: trial.reason for name, trial in failing.items()}
            proof.analysis = replace(
                find_groups(ownership, refused),
                own_calls=calls,
                flexible=proof.analysis.flexible,
                unrelated=proof.analysis.unrelated,
            )
    return proof.analysis


def _draw(size: int, random: np.random.Generator, ratio: float | None) -> np.ndarray:
    """Random units of a group: `ratio` of it, or a third to four fifths."""
    mask = np.zeros(size, bool)
    mask[random.permutation(size)[: max(1, round(size * (ratio or random.uniform(0.33, 0.8))))]] = True
    return mask


def _tie(ownership: Ownership, analysis: Analysis, failing: dict[str, Trial]) -> bool:
    """Merge, unit by unit, groups that one module's code takes to be equally many; whether any were."""
    together: dict[tuple[str, int], list[Group]] = defaultdict(list)
    for group in analysis.groups:
        if group.name in failing and failing[group.name].module:
            together[(failing[group.name].module, group.size)].append(group)
    pairs = [groups for groups in together.values() if len(groups) > 1]
    for first, *others in pairs:
        for other in others:
            ownership.merge(_atoms(ownership, first), _atoms(ownership, other))
    return bool(pairs)


def _atoms(ownership: Ownership, group: Group) -> np.ndarray:
    """One owner for every unit of a group, in order."""
    member = next(member for member in group.members if member.role == "out")
    _, first = np.unique(np.where(member.units < 0, group.size, member.units), return_index=True)
    found: np.ndarray = ownership.weights[(member.parameter, member.dim)][first[: group.size]]
    return found


def describe(analysis: Analysis) -> dict[str, Any]:
    """What may be pruned and what may not, as plain JSON values."""
    return {
        "groups": {group.name: group.size for group in analysis.groups},
        "frozen": {group.name: {"size": group.size, "reason": group.reason} for group in analysis.frozen},
    }
