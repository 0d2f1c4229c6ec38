"""Which residual blocks go first: those that give up most of the goal for their loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from cveff.compress.analysis import light_copy
from cveff.compress.batch_norm import recalibrate_batch_norm
from cveff.compress.depth import removable_blocks
from cveff.compress.drop_blocks import DropBlocks
from cveff.compress.samples import Batches, evaluation
from cveff.compress.sensitivity import divergence
from cveff.compress.trace import Trace, trace
from cveff.progress import Progress
from cveff.runtime.input_spec import InputSpec

MOST = 0.5
"""Share of the removable blocks that may go for being cheaper than channels."""
MORE = 0.25
"""Share of the blocks that are left that go at once where channels cannot reach the goal."""
IMAGES = 256


class BlockChooser:
    """Chooses blocks one at a time, each time the one that saves most for its loss. Losses are measured again with the
    earlier ones gone; what a block saves is not.

    Args:
        module: the network; left as it was.
        cost: of a traced network, in the goal's unit.
        repair: re-estimate batch norms before looking, as will be done.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: InputSpec,
        cost: Callable[[Trace], float],
        batches: Batches,
        *,
        repair: bool,
        progress: Progress,
    ) -> None:
        self._module, self._spec, self._cost, self._progress = module, spec, cost, progress
        self._batches, self._repair = _few(batches), repair
        self._saved: dict[str, float] | None = None
        with torch.no_grad(), evaluation(module):
            self._dense = [F.log_softmax(module(images).float(), 1) for images, _ in self._batches]
            self._removable = removable_blocks(module, trace(module, spec))

    def sequence(self) -> Iterator[tuple[DropBlocks, float]]:
        """One block, two, and so on up to `MOST`, each with what they cost: how far answers then are from the whole
        network's.
        """
        dropped: list[str] = []
        loss = 0.0
        for _ in range(int(MOST * len(self._removable))):
            found = self._next(dropped, loss)
            if found is None:
                return
            path, loss = found
            dropped.append(path)
            yield DropBlocks(tuple(dropped)), loss

    def more(self, drop: DropBlocks | None) -> DropBlocks | None:
        """`drop`, without which channels could not reach the goal, and more, whatever they cost; None where none is
        left that saves anything.
        """
        dropped = [] if drop is None else list(drop.modules)
        loss, before = self._loss(dropped), len(dropped)
        for _ in range(math.ceil(MORE * (len(self._removable) - before))):
            found = self._next(dropped, loss)
            if found is None:
                break
            path, loss = found
            dropped.append(path)
        return DropBlocks(tuple(dropped)) if len(dropped) > before else None

    def _next(self, dropped: Sequence[str], loss: float) -> tuple[str, float] | None:
        """The block that gives most for its loss once `dropped` are gone, and what all of them then cost."""
        best: tuple[float, str, float] | None = None
        candidates = [path for path in self._saves() if path not in dropped]
        for path in self._progress.track(candidates, "measuring blocks", len(candidates)):
            total = self._loss([*dropped, path])
            price = max(total - loss, 0.0) / self._saves()[path]
            if best is None or price < best[0]:
                best = (price, path, total)
        return None if best is None else best[1:]

    def _saves(self) -> dict[str, float]:
        """What each block takes by itself, of those that take anything."""
        if self._saved is None:
            with torch.no_grad(), evaluation(self._module):
                whole = self._cost(trace(self._module, self._spec))
                found = {
                    path: whole - self._cost(trace(self._without([path]), self._spec))
                    for path in self._removable
                }
            self._saved = {path: value for path, value in found.items() if value > 0}
        return self._saved

    def _loss(self, dropped: Sequence[str]) -> float:
        """How far the answers without these blocks are from the whole network's."""
        if not dropped:
            return 0.0
        smaller = self._without(dropped)
        with torch.no_grad(), evaluation(smaller):
            if self._repair:
                recalibrate_batch_norm(smaller, self._batches)
            return divergence(smaller, self._batches, self._dense, ", ".join(dropped))

    def _without(self, dropped: Sequence[str]) -> nn.Module:
        return DropBlocks(tuple(dropped)).apply(light_copy(self._module)).eval()


def _few(batches: Batches) -> Batches:
    kept, count = [], 0
    for images, targets in batches:
        if count >= IMAGES:
            break
        kept.append((images, targets))
        count += len(images)
    return kept
