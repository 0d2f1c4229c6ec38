"""Which residual blocks go: those that give up more of the goal for their loss than channels do on average."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from cveff.compress.depth import removable_blocks, skipped
from cveff.compress.drop_blocks import DropBlocks
from cveff.compress.samples import Batches, evaluation
from cveff.compress.sensitivity import divergence
from cveff.compress.trace import Trace, trace
from cveff.progress import Progress
from cveff.runtime.input_spec import InputSpec

MOST = 0.5
"""Share of the removable blocks that may go for being cheap; the rest is for channels to shrink."""
MORE = 0.25
"""Share of the blocks that are left that go at once where channels cannot reach the goal."""
IMAGES = 256


def cheap_blocks(
    module: nn.Module,
    spec: InputSpec,
    cost: Callable[[Trace], float],
    goal: float,
    price: float,
    batches: Batches,
    progress: Progress,
    start: DropBlocks | None = None,
) -> DropBlocks | None:
    """Choose blocks one at a time, each time the one that saves most for its loss; the losses are measured again with
    the earlier ones gone.

    Args:
        module: the network; left as it was.
        cost: of a traced network, in the goal's unit.
        goal: what the network may cost; no block goes once it is met.
        price: loss for one unit of cost that taking channels out asks for on average.
        start: blocks that go in any case. With these channels could not reach the goal: more go, whatever they cost.

    Returns:
        The edit; None where no block is cheap enough, or with `start` where none is left.
    """
    given = _few(batches)
    dropped = [] if start is None else list(start.modules)
    with torch.no_grad(), evaluation(module):
        dense = [F.log_softmax(module(images).float(), 1) for images, _ in given]
        removable = removable_blocks(module, trace(module, spec))
        candidates = [path for path in removable if path not in dropped]
        with skipped(module, dropped) as smaller:
            now = cost(trace(smaller, spec))
            loss = divergence(smaller, given, dense, "what is left") if dropped else 0.0
        if start is None:
            limit = int(MOST * len(removable))
        else:
            limit, goal, price = len(dropped) + math.ceil(MORE * len(candidates)), -math.inf, math.inf
        while len(dropped) < limit and now > goal:
            best: tuple[float, str, float, float] | None = None
            for path in progress.track(candidates, "measuring blocks", len(candidates)):
                with skipped(module, [*dropped, path]) as smaller:
                    after, total = cost(trace(smaller, spec)), divergence(smaller, given, dense, path)
                saved, added = now - after, max(total - loss, 0.0)
                if saved > 0 and (best is None or added / saved < best[0]):
                    best = (added / saved, path, after, total)
            if best is None or best[0] > price:
                break
            _, path, now, loss = best
            dropped.append(path)
            candidates.remove(path)
    if start is None and dropped:
        progress.message(f"{len(dropped)} blocks cost less than channels: {', '.join(dropped)}")
    found = DropBlocks(tuple(dropped)) if dropped else None
    return None if found == start else found


def _few(batches: Batches) -> Batches:
    kept, count = [], 0
    for images, targets in batches:
        if count >= IMAGES:
            break
        kept.append((images, targets))
        count += len(images)
    return kept
