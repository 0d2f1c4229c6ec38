"""Where to cut: the steps that buy the most milliseconds (or operations, or parameters) for the least loss, first.

A layer's time moves in steps, so every step looks several sizes ahead: one that crosses an edge is found though
the sizes before it save nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from cveff.compress.sensitivity import Cost, Curve

LOOK_AHEAD = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Sizes ahead, in the curve's own steps, that a step may go at once."""
LEAST_LOSS = 1e-9


def allocate(
    curves: Mapping[str, Curve], cost: Cost, goal: float, start: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Shrink groups until the network costs `goal` or nothing more can go.

    Greedy by saving over added loss. A group's offer is recomputed when it comes up, because cutting one group
    makes its neighbours cheaper (Minoux 1978's lazy evaluation).

    Args:
        goal: in `cost`'s unit.
        start: units each group keeps to begin with; by default all.

    Returns:
        group name -> units it keeps. Its cost may still exceed `goal`: then nothing cheaper was found.
    """
    counts = {name: curve.counts[0] for name, curve in curves.items()} | dict(start or {})
    position = {name: curve.counts.index(counts[name]) for name, curve in curves.items()}
    now = cost(counts)
    version = 0
    heap: list[tuple[float, str, int, int]] = []

    def offer(name: str) -> None:
        curve, here = curves[name], position[name]
        best: tuple[float, int] | None = None
        for ahead in LOOK_AHEAD:
            there = here + ahead
            if there >= len(curve.counts):
                break
            saved = now - cost({**counts, name: curve.counts[there]})
            loss = max(float(curve.losses[there] - curve.losses[here]), LEAST_LOSS)
            if saved > 0 and (best is None or saved / loss > best[0]):
                best = (saved / loss, there)
        if best is not None:
            heapq.heappush(heap, (-best[0], name, best[1], version))

    stale = -1
    while now > goal:
        if not heap:
            if stale == version:
                break
            stale = version  # what saved nothing before may do so now
            for name in curves:
                offer(name)
            continue
        _, name, there, seen = heapq.heappop(heap)
        if seen != version:
            offer(name)
            if not heap or heap[0][1] != name or heap[0][3] != version:
                continue  # something else may be better now
            _, name, there, seen = heapq.heappop(heap)
        position[name] = _enough(curves[name], position[name], there, {**counts}, name, cost, goal)
        counts[name] = curves[name].counts[position[name]]
        now = cost(counts)
        version += 1
        offer(name)
    return _fill_up(curves, cost, goal, counts) if now <= goal else counts


def _fill_up(curves: Mapping[str, Curve], cost: Cost, goal: float, counts: dict[str, int]) -> dict[str, int]:
    """Give back what the last, large steps took too much of: the most loss first, as long as the goal holds."""
    while True:
        gains = []
        for name, curve in curves.items():
            here = curve.counts.index(counts[name])
            if here > 0:
                gains.append(
                    (float(curve.losses[here] - curve.losses[here - 1]), name, curve.counts[here - 1])
                )
        for _, name, count in sorted(gains, reverse=True):
            larger = {**counts, name: count}
            if cost(larger) <= goal:
                counts = larger
                break
        else:
            return counts


def _enough(
    curve: Curve, here: int, there: int, counts: dict[str, int], name: str, cost: Cost, goal: float
) -> int:
    """`there`, or the first size on the way to it that reaches the goal."""
    for step in range(here + 1, there):
        counts[name] = curve.counts[step]
        if cost(counts) <= goal:
            return step
    return there
