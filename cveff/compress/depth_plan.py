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


class BlockChooser:
    """Chooses blocks one at a time, each time the one that saves most for its loss; the losses are measured again with
    the earlier ones gone.

    Args:
        module: the network; left as it was.
        cost: of a traced network, in the goal's unit.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: InputSpec,
        cost: Callable[[Trace], float],
        batches: Batches,
        progress: Progress,
    ) -> None:
        self._module, self._spec, self._cost, self._progress = module, spec, cost, progress
        self._batches = _few(batches)
        with torch.no_grad(), evaluation(module):
            self._dense = [F.log_softmax(module(images).float(), 1) for images, _ in self._batches]
            self._removable = removable_blocks(module, trace(module, spec))

    def cheap(self, goal: float, price: float) -> DropBlocks | None:
        """Blocks that are cheaper than channels; None where there is none.

        Args:
            goal: what the network may cost; no block goes once it is met.
            price: loss for one unit of cost that taking channels out asks for on average.
        """
        found = self._chosen((), int(MOST * len(self._removable)), goal, price)
        if found is not None:
            names = ", ".join(found.modules)
            self._progress.message(f"{len(found.modules)} blocks cost less than channels: {names}")
        return found

    def more(self, drop: DropBlocks | None) -> DropBlocks | None:
        """`drop`, without which channels could not reach the goal, and more, whatever they cost; None where none is
        left that saves anything.
        """
        dropped = () if drop is None else drop.modules
        count = math.ceil(MORE * (len(self._removable) - len(dropped)))
        return self._chosen(dropped, count, -math.inf, math.inf)

    def _chosen(self, start: tuple[str, ...], count: int, goal: float, price: float) -> DropBlocks | None:
        """`start` and up to `count` more; None where it is none more."""
        dropped = list(start)
        candidates = [path for path in self._removable if path not in dropped]
        with torch.no_grad(), evaluation(self._module):
            now, loss = self._without(dropped)
            while len(dropped) < len(start) + count and now > goal:
                best: tuple[float, str, float, float] | None = None
                for path in self._progress.track(candidates, "measuring blocks", len(candidates)):
                    after, total = self._without([*dropped, path])
                    saved, added = now - after, max(total - loss, 0.0)
                    if saved > 0 and (best is None or added / saved < best[0]):
                        best = (added / saved, path, after, total)
                if best is None or best[0] > price:
                    break
                _, path, now, loss = best
                dropped.append(path)
                candidates.remove(path)
        return DropBlocks(tuple(dropped)) if len(dropped) > len(start) else None

    def _without(self, dropped: list[str]) -> tuple[float, float]:
        """Cost of the network without these blocks, and how far its answers are from the whole one's."""
        with skipped(self._module, dropped) as smaller:
            name = ", ".join(dropped) or "nothing"
            return self._cost(trace(smaller, self._spec)), divergence(
                smaller, self._batches, self._dense, name
            )


def _few(batches: Batches) -> Batches:
    kept, count = [], 0
    for images, targets in batches:
        if count >= IMAGES:
            break
        kept.append((images, targets))
        count += len(images)
    return kept
