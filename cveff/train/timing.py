"""How long the evaluation of a network takes, from as few images as tell."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from torch import nn

from cveff.data.dataset import Split
from cveff.runtime.input_spec import InputSpec
from cveff.train.evaluate import evaluate

_FIRST, _GROWTH, _ENOUGH_SECONDS = 64, 4, 0.5


def evaluation_seconds(
    module: nn.Module, split: Split, spec: InputSpec, autocast: AbstractContextManager[Any] | None = None
) -> float:
    """Seconds an image that `evaluate` takes, reading and decoding included.

    More and more images are evaluated until half a second was spent, or all images.

    Raises:
        TrainingError: as `evaluate`.
    """
    count = min(_FIRST, len(split))
    evaluate(module, split.subset(np.arange(count)), spec, autocast)  # allocates, and sets kernels up
    while True:
        part = split.subset(np.linspace(0, len(split) - 1, count).astype(np.int64))
        started = time.monotonic()
        evaluate(module, part, spec, autocast)
        seconds = time.monotonic() - started
        if seconds >= _ENOUGH_SECONDS or count == len(split):
            return seconds / count
        count = min(_GROWTH * count, len(split))
