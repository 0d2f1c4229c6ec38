"""Kernels timed in turns over weights that do not fit the caches, and how fast this machine reads memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cveff.measure.latency import paired_ratio

ROTATED = 64e6
"""Bytes that the copies of what is read hold together at least, before the first is read again."""


def copies(bytes_once: float) -> int:
    """How many copies to rotate over, two at least."""
    return max(2, int(ROTATED // bytes_once) + 1)


def in_turns(
    calls: Mapping[str, Callable[[int], Any]], reference: str, rounds: int, count: int
) -> dict[str, dict[str, float]]:
    """Milliseconds and the reference's time over each way's, the median of the rounds' ratios.

    Args:
        calls: by name, each called with the number of the copy to read.
        reference: what 1 stands for.
        count: copies to rotate over.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for copy in range(count):
            call(copy)
    for turn in range(rounds):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for copy in range(count):
                calls[name](copy)
            times[name].append(1000 * (time.perf_counter() - start) / count)
    found = {}
    for name, own in times.items():
        ratio = paired_ratio(times[reference], own)
        found[name] = {
            "ms": statistics.median(own),
            "times_as_fast": ratio.median,
            "low": ratio.low,
            "high": ratio.high,
            "spread": ratio.spread,
        }
    return found


def read_bandwidth(rounds: int) -> float:
    """Gigabytes a second at which all threads sum 512 MB: what no kernel that reads memory can be faster than."""
    values = torch.ones(2**27)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - start)
    return values.numel() * 4 / statistics.median(times) / 1e9
