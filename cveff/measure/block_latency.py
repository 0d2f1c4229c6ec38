"""`BlockLatency`: how long blocks take on a device, measured once on its engine and remembered.

A search over widths asks for thousands of blocks. `interpolate=True` measures a grid of widths only, multiples of 8 up
to 64 and then in steps of 12%, and is linear in each width between them; on the grid it is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from cveff.errors import CveffError
from cveff.measure.block import Block
from cveff.measure.block_engines import engine_version, measure_block
from cveff.measure.block_table import BlockTable
from cveff.measure.threads import pinned_threads, usable_cores
from cveff.progress import Progress, Silent

__all__ = ["Block", "BlockLatency", "grid_neighbours"]

STEP = 8
"""Grid and engines' vectors: widths between multiples of 8 are padded to one."""
FINE, GROWTH = 64, 1.12
"""Up to `FINE` every multiple of 8 is on the grid; past it the next is this many times as wide, at least."""
SAVE_EVERY = 50
"""Blocks measured between two writes of the file: what is lost when a run is stopped."""

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
        self._between: dict[
            Block, float
        ] = {}  # what was interpolated: a search asks for the same blocks again

    def milliseconds(
        self, blocks: Sequence[Block], *, interpolate: bool = False, progress: Progress | None = None
    ) -> np.ndarray:
        """Time of each block's kernels alone, without what a call of the engine costs.

        Args:
            interpolate: measure only blocks whose widths lie on the grid; one that is in the table is exact anyway.

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
                    known[key] if key in known else self._between[block]
                    for block, key in zip(blocks, keys, strict=True)
                ]
            )
        self._fill(unknown, progress or Silent())
        return np.array([known[key] for key in keys])

    def _interpolate(self, blocks: Sequence[Block], progress: Progress) -> None:
        corners = [_corners(block) for block in blocks]
        self._fill([corner for near in corners for corner, _ in near], progress)
        known = self._table.milliseconds
        for block, near in zip(blocks, corners, strict=True):
            self._between[block] = sum(share * known[corner.key] for corner, share in near)

    def _fill(self, blocks: Iterable[Block], progress: Progress) -> None:
        known = self._table.milliseconds
        missing = {block.key: block for block in blocks if block.key not in known}
        if not missing:
            return
        try:
            with pinned_threads(self.threads):
                for key, block in progress.track(missing.items(), "measuring blocks", len(missing)):
                    known[key] = float(self._measure(self.engine, block, self.threads))
                    self.num_measured += 1
                    if self.num_measured % SAVE_EVERY == 0:
                        self._save()
        finally:
            self._save()

    def _save(self) -> None:
        known = self._table.milliseconds
        self._table.save()
        # Others' blocks came in; this table stays the object that callers hold.
        known.update(self._table.milliseconds)
        self._table.milliseconds = known


def grid_neighbours(width: int) -> tuple[int, int]:
    """The widths of the grid on either side of `width`: equal where it is on the grid (as 1 to 8 are)."""
    if width <= STEP:
        return width, width
    low = STEP
    while True:
        high = low + STEP if low < FINE else -(-int(low * GROWTH + 0.5) // STEP) * STEP
        if width == high:
            return high, high
        if width < high:
            return low, high
        low = high


def _corners(block: Block) -> list[tuple[Block, float]]:
    """Blocks on the grid around `block`, and the share of each: linear in every width."""
    widths = block.widths()
    sides: list[list[tuple[int, float]]] = []
    for width in widths:
        low, high = grid_neighbours(width)
        along = 0.0 if low == high else (width - low) / (high - low)
        sides.append([(low, 1.0)] if low == high else [(low, 1 - along), (high, along)])
    return [
        (block.resized(tuple(width for width, _ in corner)), float(np.prod([share for _, share in corner])))
        for corner in itertools.product(*sides)
    ]
