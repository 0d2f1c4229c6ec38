"""`analyze`: a network's groups of channels, each tried and proven before it is offered."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cveff.compress.groups import Analysis, Group, find_groups
from cveff.compress.oracle import zeroed
from cveff.compress.ownership import Attention, Ownership
from cveff.compress.trace import trace
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
    random = np.random.default_rng(seed)
    like = next(module.parameters())
    images = torch.from_numpy(random.standard_normal((1, spec.channels, *spec.size))).to(like)
    analysis = find_groups(ownership)
    for _ in range(2):  # two draws: sizes that fit by luck once will not fit again
        while analysis.groups:
            keep = {group.name: _draw(group.size, random) for group in analysis.groups}
            analysis = repair(module, analysis, keep, images)
            failing = _failing(analysis, module, keep, images)
            if not failing:
                break
            if not _tie(ownership, analysis, failing):
                refused |= {name: trial.reason for name, trial in failing.items()}
            analysis = replace(
                find_groups(ownership, refused), flexible=analysis.flexible, unrelated=analysis.unrelated
            )
    return analysis


def check(module: nn.Module, analysis: Analysis, keep: dict[str, np.ndarray], images: torch.Tensor) -> float:
    """Relative difference between the pruned network and the dense one with those channels at zero.

    Args:
        module: the dense network; left as it was.
        keep: group name -> bool (size,).
        images: (N, C, H, W) float, normalised.

    Returns:
        max|pruned - zeroed| / max|zeroed| over the logits.
    """
    small = analysis.edit(keep, module).apply(light_copy(module)).eval()
    with torch.no_grad():
        logits = small(images)
    return relative_difference(logits.cpu().numpy(), zeroed(analysis, keep, images).cpu().numpy())


def light_copy(module: nn.Module) -> nn.Module:
    """A copy that shares parameters and buffers: enough for edits, which replace tensors and never write to them."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


@dataclass(frozen=True)
class _Trial:
    """What became of a cut: `reason` is empty where it holds, `module` the path of the code that refused it."""

    reason: str = ""
    module: str = ""


def _try(
    module: nn.Module,
    analysis: Analysis,
    keep: dict[str, np.ndarray],
    images: torch.Tensor,
    is_exact: bool = True,
) -> _Trial:
    small = analysis.edit(keep, module).apply(light_copy(module)).eval()
    try:
        with torch.no_grad():
            logits = small(images)
    except Exception as error:  # whatever the network's own code raises on the new sizes
        reason = f"the network does not run without it: {first_line(error)[:200]}"
        return _Trial(reason, _failing_module(small, error))
    if is_exact:
        difference = relative_difference(logits.cpu().numpy(), zeroed(analysis, keep, images).cpu().numpy())
        if not difference <= TOLERANCE:
            return _Trial(f"without it the network differs from the dense one by {difference:.1e}")
    return _Trial()


def _failing(
    analysis: Analysis, module: nn.Module, keep: dict[str, np.ndarray], images: torch.Tensor
) -> dict[str, _Trial]:
    """Names of groups whose cut does not hold; halved until single groups are found."""
    failing: dict[str, _Trial] = {}
    pending: list[list[str]] = [list(keep)]
    last = _Trial()
    while pending:
        names = pending.pop()
        trial = _try(module, analysis, {name: keep[name] for name in names}, images)
        if not trial.reason:
            continue
        last = trial
        if len(names) == 1:
            failing[names[0]] = trial
        else:
            middle = len(names) // 2
            pending += [names[:middle], names[middle:]]
    if last.reason and not failing:
        # Each half holds alone but not together: give up the later half rather than guess.
        return dict.fromkeys(list(keep)[len(keep) // 2 :], replace(last, module=""))
    return failing


def _draw(size: int, random: np.random.Generator) -> np.ndarray:
    """A random third to four fifths of a group."""
    mask = np.zeros(size, bool)
    mask[random.permutation(size)[: max(1, round(size * random.uniform(0.33, 0.8)))]] = True
    return mask


def _tie(ownership: Ownership, analysis: Analysis, failing: dict[str, _Trial]) -> bool:
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


def repair(
    module: nn.Module, analysis: Analysis, keep: dict[str, np.ndarray], images: torch.Tensor
) -> Analysis:
    """Learn from what fails which modules need flexible reshapes, and which attributes are unrelated."""
    while True:
        failing = _try(module, analysis, keep, images, is_exact=False).module
        if not failing:
            return analysis
        kind = type(module.get_submodule(failing))
        same = frozenset(path for path, inner in module.named_modules() if type(inner) is kind)
        options = (
            [replace(analysis, flexible=analysis.flexible | same)] if failing not in analysis.flexible else []
        )
        held = sorted(analysis.edit(keep, module).attributes.get(failing, {}))
        options += [
            replace(analysis, unrelated=analysis.unrelated | {(failing, name) for name in names})
            for count in (1, 2)
            for names in itertools.combinations(held, count)
        ]
        found = next(
            (item for item in options if _try(module, item, keep, images, is_exact=False).module != failing),
            None,
        )
        if found is None:
            return analysis
        analysis = found


def _failing_module(small: nn.Module, error: BaseException) -> str:
    """Path of the innermost module whose code does not take the new sizes."""
    names = {id(inner): name for name, inner in small.named_modules()}
    found, frames = "", error.__traceback__
    while frames is not None:
        inner = names.get(id(frames.tb_frame.f_locals.get("self")))
        # torch's own layers only take what they are given: the code that calls them is at fault.
        if inner and not type(small.get_submodule(inner)).__module__.startswith("torch.nn"):
            found = inner
        frames = frames.tb_next
    return found


def describe(analysis: Analysis) -> dict[str, Any]:
    """What may be pruned and what may not, as plain JSON values."""
    return {
        "groups": {group.name: group.size for group in analysis.groups},
        "frozen": {group.name: {"size": group.size, "reason": group.reason} for group in analysis.frozen},
    }
