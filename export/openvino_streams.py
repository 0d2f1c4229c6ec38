"""Whether OpenVINO's streams pay for a file: its throughput hint against its latency hint, by measurement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cveff.measure.latency import compare
from cveff.runtime.engines import open_file
from cveff.target import Target

SECONDS = 2.0
"""Time for rounds."""


def with_streams(path: Path, options: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """`options`, with the throughput hint where a batch of the target's first size takes less time so.

    A batch is then divided among as many streams as there are threads. Nothing is measured where the first size is 1
    or there is one thread, which leave nothing to divide.

    Raises:
        EngineError: OpenVINO cannot open or run the file.
    """
    plain = dict(options)
    batch, threads = target.batch_sizes[0], target.num_threads
    if batch == 1 or threads == 1:
        return plain
    streams = {**plain, "performance_hint": "throughput", "streams": min(batch, threads)}
    with (
        open_file("openvino", path, threads=threads, options=plain) as together,
        open_file("openvino", path, threads=threads, options=streams) as divided,
    ):
        if together.size is None or together.channels is None or together.batch is not None:
            return plain
        shape = (batch, *together.size, together.channels)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        result = compare({"together": together, "divided": divided}, images, budget_seconds=SECONDS)
    return streams if result.ratio("divided", "together").high < 1 else plain
