"""What pruning a group costs in accuracy: a curve over how many units it keeps, measured or summed from scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cveff.compress.analysis import light_copy
from cveff.compress.batch_norm import recalibrate_batch_norm
from cveff.compress.compensate import Compensator, moment_bytes
from cveff.compress.groups import Analysis, Group
from cveff.compress.samples import Batches, evaluation, require_batches
from cveff.compress.scopes import choices, keep_best, normalized
from cveff.errors import StepError
from cveff.progress import Progress, Silent

MEMORY = 1 << 30
"""Bytes of layers' second moments held at a time; with more, the images are run again."""
POINTS = (0.75, 0.5, 0.25)
"""Shares of a group that are left where its curve is measured; between them it is linear."""
TRUSTED = 0.95
"""Share of the images that say how far answers move: those they move least on."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Loss against units kept.

    Attributes:
        counts: numbers of units the group may keep, descending from all of them.
        losses: (len(counts),) what each costs; 0 for all, never falling.
    """

    counts: tuple[int, ...]
    losses: np.ndarray


def summed_curves(
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    *,
    is_comparable: bool,
    round_to: int = 8,
    min_fraction: float = 0.1,
) -> dict[str, Curve]:
    """The cost of dropping units is the sum of their scores.

    Args:
        is_comparable: scores of different groups are in one unit (a change of the loss); otherwise each group's
            are divided by their mean first.
    """
    curves = {}
    for group in groups:
        values = scores[group.name] if is_comparable else normalized(scores[group.name])
        counts = _descending(group, round_to, min_fraction)
        worst_first = np.concatenate([[0.0], np.cumsum(np.sort(values))])
        curves[group.name] = Curve(counts, np.array([worst_first[group.size - count] for count in counts]))
    return curves


def measured_curves(
    module: nn.Module,
    analysis: Analysis,
    scores: Mapping[str, np.ndarray],
    batches: Batches,
    *,
    round_to: int = 8,
    min_fraction: float = 0.1,
    seconds: float = 60.0,
    repair: bool = False,
    progress: Progress | None = None,
) -> dict[str, Curve]:
    """Prune each group alone and see how far the network's answers move (`divergence`).

    Batch norms are re-estimated first, as they are when a cut is carried out. NetAdapt (Yang et al., ECCV 2018)
    measures every layer's effect the same way; we do it once, not every round.

    Args:
        batches: images; as many of them are used as `seconds` allow, at least one batch.
        seconds: rough limit for all groups together.
        repair: let what stays stand in for what goes (`compensate`) before looking, as will be done: what others can
            replace costs little, however large it is.

    Raises:
        StepError: no images, or a pruned network whose answers are not finite.
    """
    given = require_batches(batches, "measuring what each group costs")
    points = {
        group.name: sorted(
            {_nearest(group, share, round_to, min_fraction) for share in POINTS} - {group.size}
        )
        for group in analysis.groups
    }
    with torch.no_grad(), evaluation(module):
        start = time.perf_counter()
        dense = [F.log_softmax(module(given[0][0]).float(), 1)]
        each = time.perf_counter() - start
        trials = sum(len(counts) for counts in points.values())
        number = int(np.clip(seconds / max(each * trials, 1e-9), 1, len(given)))
        dense += [F.log_softmax(module(images).float(), 1) for images, _ in given[1:number]]
        # Batch norms estimated again move answers on their own: that is no group's cost.
        whole = light_copy(module)
        recalibrate_batch_norm(whole, given[:number])
        already = divergence(whole, given[:number], dense, "nothing")
        curves = {}
        compensators: dict[str, Compensator] = {}
        parts = _in_parts(module, analysis.groups) if repair else []
        for group in (progress or Silent()).track(
            analysis.groups, "measuring sensitivity", len(analysis.groups)
        ):
            if repair and group.name not in compensators:
                part = parts.pop(0)
                shared = Compensator(module, part, given[:number], trace=analysis.trace)
                compensators = {other.name: shared for other in part}
            losses = {group.size: 0.0}
            for count in points[group.name]:
                keep = {group.name: keep_best(scores[group.name], count)}
                source = _repaired(module, compensators[group.name], keep) if repair else module
                small = analysis.edit(keep, source).apply(light_copy(source)).eval()
                recalibrate_batch_norm(small, given[:number])
                found = divergence(small, given[:number], dense, group.name)
                losses[count] = max(found - already, 0.0)
            curves[group.name] = _curve(group, losses, round_to, min_fraction)
    return curves


def _repaired(module: nn.Module, compensator: Compensator, keep: Mapping[str, np.ndarray]) -> nn.Module:
    """`module` as `compensator` repairs it for a cut; what is not repaired is shared with it."""
    changed = light_copy(module)
    for path, value in compensator(keep).state.items():
        owner_path, _, name = path.rpartition(".")
        owner = changed.get_submodule(owner_path)
        if name in owner._parameters:
            owner._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[name] = value
    return changed


def _in_parts(module: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    """Groups whose layers' moments fit into memory together."""
    parts: list[list[Group]] = []
    held = MEMORY
    for group in groups:
        size = moment_bytes(module, [group])
        if held + size > MEMORY:
            parts.append([])
            held = 0
        parts[-1].append(group)
        held += size
    return parts


def divergence(small: nn.Module, batches: Batches, dense: Sequence[torch.Tensor], name: str) -> float:
    """KL(dense ‖ small) in nats, at most ln(classes) an image, its mean over the images it is least on.

    A network may answer a few images with logits in the hundreds, and any change changes those by as much: they would
    drown all others. An answer that is further off than none at all counts as none.

    Args:
        dense: log-probabilities of the dense network for every batch.
        name: of what was taken away, for the error.

    Raises:
        StepError: the answers are not finite.
    """
    found = []
    for (images, _), expected in zip(batches, dense, strict=True):
        answer = F.log_softmax(small(images).float(), 1)
        found.append((expected.exp() * (expected - answer)).sum(1))
    each = torch.cat(found)
    if not bool(torch.isfinite(each).all()):
        raise StepError(
            f"the network's answers are not finite once part of {name} is gone; check its weights"
        )
    least = each.clamp(0.0, math.log(dense[0].shape[1])).sort().values
    return float(least[: math.ceil(TRUSTED * len(least))].mean())


def _curve(group: Group, losses: Mapping[int, float], round_to: int, min_fraction: float) -> Curve:
    """Through the measured points, never falling as units go; past the last one as steep as its last piece."""
    known = sorted(losses, reverse=True)
    values = np.maximum.accumulate([losses[count] for count in known])
    counts = _descending(group, round_to, min_fraction)
    dropped = group.size - np.asarray(known, float)
    wanted = group.size - np.asarray(counts, float)
    curve = np.interp(wanted, dropped, values)
    if len(known) > 1:
        slope = (values[-1] - values[-2]) / max(dropped[-1] - dropped[-2], 1.0)
        beyond = wanted > dropped[-1]
        curve[beyond] = values[-1] + 2 * slope * (wanted[beyond] - dropped[-1])
    return Curve(counts, curve)


def _descending(group: Group, round_to: int, min_fraction: float) -> tuple[int, ...]:
    return tuple(reversed(choices(group, round_to=round_to, min_fraction=min_fraction)))


def _nearest(group: Group, share: float, round_to: int, min_fraction: float) -> int:
    allowed = choices(group, round_to=round_to, min_fraction=min_fraction)
    return min(allowed, key=lambda count: abs(count - share * group.size))


Cost = Callable[[Mapping[str, int]], float]
"""Units kept, by group -> milliseconds, operations or parameters of the whole network."""
