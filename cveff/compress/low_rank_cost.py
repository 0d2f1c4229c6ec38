"""Milliseconds of factors, from the device's table of measured blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cveff.compress.low_rank_options import Cost, Stage
from cveff.measure.block import Block
from cveff.measure.block_latency import BlockLatency


def measured_cost(engine: str, threads: int) -> Cost:
    """A cost that asks `BlockLatency`; blocks it has not met are measured now and kept on disk.

    Args:
        engine: "onnxruntime" or "openvino".
        threads: of the engine; 0: every core this process may use.
    """
    table = BlockLatency(engine, threads)

    def cost(stages: Sequence[Stage]) -> np.ndarray:
        return table.milliseconds([block_of(stage) for stage in stages])

    return cost


def block_of(stage: Stage) -> Block:
    """A factor as the block an engine runs."""
    factor, shape = stage
    if factor.is_linear:
        return Block("linear", (shape,), (factor.outputs, factor.inputs))
    return Block(
        "conv",
        (shape,),
        (factor.outputs, factor.inputs, *factor.kernel),
        stride=factor.stride,
        padding=factor.padding,
        dilation=factor.dilation,
    )
