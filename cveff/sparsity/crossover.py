"""From which share on a part of a layer takes longer than the whole: measured, as it depends on machine and batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_ROUNDS = 7


@torch.no_grad()
def crossover(
    whole: Callable[[], Tensor],
    part: Callable[[Tensor], Tensor],
    size: int,
    device: torch.device,
) -> float:
    """The largest share up to which `part` is no slower than `whole`, timed in turns; 0 if it always is.

    Args:
        whole: computes the layer.
        part: computes what an index (K,) int64 names.
        size: what the index counts.
        device: where both run.
    """
    indices = [
        torch.randperm(size, generator=torch.Generator().manual_seed(0))[: max(1, round(share * size))]
        .sort()
        .values.to(device)
        for share in _SHARES
    ]
    calls = [whole, *((lambda index=index: part(index)) for index in indices)]
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(_ROUNDS + 1):
        for own, call in zip(times, calls, strict=True):
            seconds = _seconds(call, device)
            if turn:  # the first compiles and warms up
                own.append(seconds)
    dense, *parts = (statistics.median(own) for own in times)
    best = 0.0
    for share, seconds in zip(_SHARES, parts, strict=True):
        if seconds > dense:
            break
        best = share
    return best


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
