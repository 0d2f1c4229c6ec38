"""`BlockLatency`: how long blocks take on a device, measured once on its engine and remembered.

A search over widths asks for thousands of blocks. `interpolate=True` measures a grid of widths only, multiples of 8 up
to 64 and then in steps of 12%, and is linear in each width between them, and lets no block take
longer than one that is a little wider.

One block is measured again and again between the others: while it takes longer than it has, something else is running,
and what was measured meanwhile is measured again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from cveff.errors import CveffError
from cveff.measure.block import Block
from cveff.measure.block_engines import engine_version, measure_block
from cveff.measure.block_grid import corners, steps
from cveff.measure.block_table import BlockTable
from cveff.measure.calm import Calm
from cveff.measure.threads import pinned_threads, usable_cores
from cveff.progress import Progress, Silent

__all__ = ["Block", "BlockLatency"]

SAVE_EVERY = 50
"""Blocks measured between two writes of the file: what is lost when a run is stopped."""
PROBE = Block("conv", ((1, 128, 14, 14),), weight=(128, 128, 3, 3), stride=(1, 1), padding=(1, 1))
"""What tells whether other programs slow the machine down."""
DOUBTFUL = 1.15
"""Times a wider block's time that a block may take."""
AGAIN = 3
"""How often a block is measured at most, if not calmly; its least counts."""
BOUNDED = 3
"""Steps of the grid that a wider block may be away for its time to bound a narrower one's."""

Measure = Callable[[str, Block, int], float]


class BlockLatency:
    """A table of blocks for one engine and number of threads on this machine.

    Attributes:
        engine, threads: what is measured.
        path: the table's file.
        num_measured: blocks this object has measured, rather than found in the file.
    """

    def __init__(
        self,
        engine: str = "onnxruntime",
        threads: int = 0,
        cache: Path | None = None,
        *,
        measure: Measure = measure_block,
    ) -> None:
        """
        Args:
            engine: "onnxruntime" or "openvino".
            threads: of the engine; 0 means every core this process may use.
            cache: folder of tables; by default `cveff.measure.block_table.cache_folder()`.
            measure: (engine, block, threads) -> milliseconds; tests inject their own.

        Raises:
            CveffError: `threads` is negative.
            EngineError: the engine is unknown or not installed.
        """
        if threads < 0:
            raise CveffError(f"threads is {threads}; give 1 or more, or 0 for every core")
        self.engine, self.threads = engine, threads or usable_cores()
        self._table = BlockTable(engine, engine_version(engine), self.threads, cache)
        self._measure = measure
        self.path = self._table.path
        self.num_measured = 0
        known = self._table.milliseconds
        self._calm = Calm(
            lambda: float(measure(self.engine, PROBE, self.threads)), known.get(PROBE.key, math.inf)
        )
        self._between: dict[
            Block, float
        ] = {}  # what was interpolated: a search asks for the same blocks again

    def milliseconds(
        self, blocks: Sequence[Block], *, interpolate: bool = False, progress: Progress | None = None
    ) -> np.ndarray:
        """Time of each block's kernels alone, without what a call of the engine costs.

        Args:
            interpolate: measure only blocks whose widths lie on the grid, and let no block take longer than a wider one
                near it.

        Returns:
            (number of blocks,) float64 milliseconds.

        Raises:
            EngineError: the engine cannot run a block.
            CveffError: a block of an unknown kind, or the table cannot be written.
        """
        known = self._table.milliseconds
        keys = [block.key for block in blocks]
        unknown = [block for block, key in zip(blocks, keys, strict=True) if key not in known]
        if interpolate:
            self._interpolate(
                [block for block in unknown if block not in self._between], progress or Silent()
            )
            return np.array(
                [
                    self._bounded(block) if key in known else self._between[block]
                    for block, key in zip(blocks, keys, strict=True)
                ]
            )
        self._fill(unknown, progress or Silent())
        return np.array([known[key] for key in keys])

    def _interpolate(self, blocks: Sequence[Block], progress: Progress) -> None:
        around = [corners(block) for block in blocks]
        self._fill([corner for near in around for corner, _ in near], progress)
        for block, near in zip(blocks, around, strict=True):
            self._between[block] = sum(share * self._bounded(corner) for corner, share in near)

    def _bounded(self, block: Block, reach: int = BOUNDED) -> float:
        """Its time in the table, or a wider block's if that is less: what took longer was probably disturbed."""
        known = self._table.milliseconds
        wider = [other for other in steps(block, 1) if other.key in known] if reach else []
        return min([known[block.key], *(self._bounded(other, reach - 1) for other in wider)])

    def _fill(self, blocks: Iterable[Block], progress: Progress) -> None:
        known = self._table.milliseconds
        missing = {block.key: block for block in blocks if block.key not in known}
        if not missing:
            return
        restless = 0
        try:
            with pinned_threads(self.threads):
                self._look()
                waiting: list[Block] = []
                for key in progress.track(missing, "measuring blocks", len(missing)):
                    self._time(key, missing[key])
                    waiting.append(missing[key])
                    self.num_measured += 1
                    if self.num_measured % SAVE_EVERY == 0:
                        self._save()
                    if self._calm.is_due:
                        restless += 0 if self._settle(waiting) else len(waiting)
                        waiting = []
                restless += 0 if self._settle(waiting) else len(waiting)
                self._doubt(missing.values())
        finally:
            self._save()
        if restless:
            progress.message(
                f"{restless} of {len(missing)} blocks were measured while other programs slowed the machine down; "
                f"the least of their {AGAIN} times counts. They are kept in {self.path}: delete it to measure again"
            )

    def _time(self, key: str, block: Block) -> None:
        known = self._table.milliseconds
        now = float(self._measure(self.engine, block, self.threads))
        known[key] = min(now, known.get(key, now))

    def _settle(self, blocks: Sequence[Block]) -> bool:
        """Measure blocks again that were measured while the machine was slow; whether it came to rest."""
        for _ in range(AGAIN - 1):
            before = self._calm.now
            if self._look() and before:
                return True
            for block in blocks:
                self._time(block.key, block)
        return self._look()

    def _doubt(self, blocks: Iterable[Block]) -> None:
        """Measure blocks again that took longer than wider ones: something else ran, too shortly for `PROBE`."""
        doubtful = {block.key: block for block in blocks}
        for _ in range(AGAIN - 1):
            doubtful = {
                block.key: block
                for near in doubtful.values()
                for block in (near, *steps(near, -1))
                if self._exceeds(block)
            }
            for key, block in doubtful.items():
                self._time(key, block)

    def _exceeds(self, block: Block) -> bool:
        known = self._table.milliseconds
        if block.key not in known:
            return False
        wider = [known[other.key] for other in steps(block, 1) if other.key in known]
        return bool(wider) and known[block.key] > DOUBTFUL * min(wider)

    def _look(self) -> bool:
        calm = self._calm.look()
        known = self._table.milliseconds
        known[PROBE.key] = min(self._calm.least, known.get(PROBE.key, math.inf))
        return calm

    def _save(self) -> None:
        known = self._table.milliseconds
        self._table.save()
        # Others' blocks came in; this table stays the object that callers hold.
        known.update(self._table.milliseconds)
        self._table.milliseconds = known
