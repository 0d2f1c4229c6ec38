"""Section of choices.py: engine threads that go on spinning after a call, and what waiting for them changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from workshop import Workshop

from cveff.measure import compare
from cveff.measure.threads import rest
from cveff.runtime.engines import open_file
from cveff.runtime.session import Session

THREADS = 2
PAUSE = 0.3
"""Seconds watched after a call."""
REPEATS = 9


def waiting(workshop: Workshop) -> dict[str, Any]:
    """CPU time that two threads of an engine use after a call, and paired ratios with and without `rest`.

    The pair is one file opened twice, so the true ratio is 1. Times are wall-clock: CPU time would count the spinning.
    """
    found: dict[str, Any] = {"models": {}}
    for name in workshop.some(("resnet18", "efficientnet_lite0")):
        files = {"onnxruntime": workshop.exported(name), "openvino": workshop.openvino(name)}
        images = workshop.held_out(name)[:1]
        found["models"][name] = {
            engine: _one_engine(
                lambda engine=engine, path=path: open_file(engine, path, threads=THREADS),
                images,
                workshop.seconds,
            )
            for engine, path in files.items()
        }
    return found


def _one_engine(opening: Callable[[], Session], images: np.ndarray, seconds: float) -> dict[str, Any]:
    first, second = opening(), opening()
    timings = {}
    for label, wait in (("waiting", rest), ("at once", lambda: None)):
        timed = compare({"first": first, "second": second}, images, budget_seconds=seconds, rest=wait)
        candidate = timed.candidates["second"]
        ratio = candidate.speedup
        timings[label] = {
            "median_ms": candidate.median_ms,
            "ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high, "spread": ratio.spread},
        }
    return {
        "spins_ms": float(np.median([_spinning(first, images) for _ in range(REPEATS)])),
        "timings": timings,
    }


def _spinning(call: Callable[[np.ndarray], Any], images: np.ndarray) -> float:
    """CPU milliseconds that the process's threads use after a call has returned."""
    for _ in range(3):
        call(images)
    before = time.process_time()
    time.sleep(PAUSE)
    return 1000 * (time.process_time() - before)
