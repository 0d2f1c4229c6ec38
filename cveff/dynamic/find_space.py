"""From a network to its elastic space: groups of channels, trailing residual blocks, depthwise kernels, image sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from cveff.backbones.reparameterize import is_mergeable
from cveff.compress.depth import removable_blocks
from cveff.compress.groups import Analysis
from cveff.compress.scopes import rounded
from cveff.dynamic.elastic_space import ElasticSpace
from cveff.dynamic.image_sizes import at_size
from cveff.dynamic.shrink_kernels import can_shrink
from cveff.errors import StepError
from cveff.model import Model


def find_space(
    model: Model,
    analysis: Analysis,
    scores: Mapping[str, np.ndarray],
    *,
    shares: Sequence[float],
    depth: int,
    sides: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    round_to: int,
    apart: bool,
    transform: bool,
) -> ElasticSpace:
    """The space of `model`'s sub-nets; settings are `Elastic`'s.

    Args:
        analysis: of the model.
        scores: (size,) importance of each group's units.

    Raises:
        StepError: nothing of the network is elastic (the message says why), or its images cannot have a size.
    """
    widths = {
        group.name: [
            rounded(group, share * group.size, round_to=round_to, min_fraction=0) for share in shares
        ]
        for group in analysis.groups
    }
    widths = {name: counts for name, counts in widths.items() if len(set(counts)) > 1}
    stages = _stages(model.module, analysis, depth) if depth else {}
    known_sides, kernels = _kernels(model.module, sides)
    own = model.spec.input.size
    for size in sizes:
        at_size(model.spec, size)
    space = ElasticSpace(
        shares=tuple(shares) if widths else (1.0,),
        widths=widths,
        order={name: np.argsort(-scores[name], kind="stable").tolist() for name in widths},
        depth=min(depth, max(map(len, stages.values()), default=0)),
        stages=stages,
        sides=known_sides,
        kernels=kernels,
        sizes=(own, *(size for size in sizes if size != own)),
        apart=apart,
        transform=transform and bool(kernels),
    )
    if space.largest == space.smallest:
        asked = {"widths": tuple(shares), "depth": depth, "kernels": tuple(sides)}
        raise StepError(_why_not(model, analysis, asked))
    return space


def _stages(module: nn.Module, analysis: Analysis, depth: int) -> dict[str, tuple[str, ...]]:
    """First block that may go -> the residual blocks of its stage that may, the last first. A stage keeps something."""
    removable = set(removable_blocks(module, analysis.trace))
    found = {}
    for path, parent in module.named_modules():
        for run in _runs(path, parent, removable):
            # A module whose calls are corrected by their number must go on making all of them.
            if run and not any(_is_within(block, counted) for block in run for counted in analysis.flexible):
                found[run[0]] = tuple(reversed(run))[:depth]
    return found


def _runs(path: str, parent: nn.Module, removable: set[str]) -> Iterator[list[str]]:
    """Neighbours among the children that can be removed; without the first where the stage begins with it."""
    run: list[str] = []
    begins = True
    for name, _ in parent.named_children():
        full = f"{path}.{name}" if path else name
        if full in removable and not begins:
            run.append(full)
        elif full not in removable:
            yield run
            run = []
        begins = False
    yield run


def _is_within(path: str, outer: str) -> bool:
    return not outer or path.startswith(f"{outer}.")


def _kernels(module: nn.Module, sides: Sequence[int]) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """The sides, from the largest there is, and those of every depthwise convolution that has several."""
    # Branches that export merges into one kernel know the kernels of each other.
    branched = [path for path, part in module.named_modules() if path and is_mergeable(part)]
    depthwise = {
        path: conv
        for path, conv in module.named_modules()
        if isinstance(conv, nn.Conv2d)
        and conv.groups > 1
        and conv.weight.shape[1] == 1
        and not any(_is_within(path, outer) for outer in branched)
    }
    largest = max((conv.kernel_size[0] for conv in depthwise.values()), default=0)
    if not sides or min(sides) >= largest:
        return (), {}
    sides = (largest, *(side for side in sides if side < largest))
    found = {}
    for path, conv in depthwise.items():
        levels = tuple(min(conv.kernel_size[0], side) for side in sides)
        if len(set(levels)) > 1 and all(can_shrink(conv, side) for side in levels):
            found[path] = levels
    return (sides if found else ()), found


def _why_not(model: Model, analysis: Analysis, asked: Mapping[str, object]) -> str:
    """What kept each dimension from being elastic."""
    reasons = {group.reason for group in analysis.frozen}
    channels = "; ".join(sorted(reasons)[:3]) if not analysis.groups else "groups are too small for round_to"
    return (
        f"nothing of {model.spec.architecture} is elastic with widths {asked['widths']}, depth {asked['depth']}, "
        f"kernels {asked['kernels']} and one image size. Channels: {channels or 'it has none'}. Depth: no stage has a "
        "residual block to spare. Kernels: no depthwise convolution has a larger one. Give other settings, or another "
        "architecture"
    )
