"""How long the evaluation of a network takes, from as few images as tell."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from cveff.data.dataset import Split

_FIRST, _GROWTH, _ENOUGH_SECONDS = 64, 4, 0.5


def evaluation_seconds(evaluate: Callable[[Split], object], split: Split) -> float:
    """Seconds that `evaluate(split)` takes, reading and decoding included.

    It is called on more and more of the images until half a second was spent, or on all of them.
    """
    count = min(_FIRST, len(split))
    evaluate(split.subset(np.arange(count)))  # allocates, and sets kernels up
    while True:
        part = split.subset(np.linspace(0, len(split) - 1, count).astype(np.int64))
        started = time.monotonic()
        evaluate(part)
        seconds = time.monotonic() - started
        if seconds >= _ENOUGH_SECONDS or count == len(split):
            return seconds * len(split) / count
        count = min(_GROWTH * count, len(split))
