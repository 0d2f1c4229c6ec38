"""The grid of widths that blocks are measured on: multiples of 8 up to 64, then steps of 12%."""

from __future__ import annotations

import itertools

import numpy as np

from cveff.measure.block import Block

STEP = 8
"""Grid and engines' vectors: widths between multiples of 8 are padded to one."""
FINE, GROWTH = 64, 1.12
"""Up to `FINE` every multiple of 8 is on the grid; past it the next is this many times as wide, at least."""


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


def steps(block: Block, direction: int) -> list[Block]:
    """The same block with one of its widths a step of the grid wider (1) or narrower (-1), where it is on the grid."""
    widths = block.widths()
    found = []
    for index, width in enumerate(widths):
        low, high = grid_neighbours(width)
        if low != high or width <= STEP:
            continue
        other = grid_neighbours(width + direction)[1 if direction > 0 else 0]
        found.append(block.resized((*widths[:index], other, *widths[index + 1 :])))
    return found


def corners(block: Block) -> list[tuple[Block, float]]:
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
