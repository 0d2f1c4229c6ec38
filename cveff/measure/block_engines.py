"""How long an engine's kernels take for one `Block`, read from the engine's own profile.

A block alone is not a block inside a network: ONNX Runtime converts what goes into and comes out of a lone convolution
from and to its blocked layout, and a call costs some microseconds. The profile times every kernel by itself, so both
are left out, and so is what the profile itself takes.
"""

from __future__ import annotations

import numpy as np

from cveff.errors import EngineError
from cveff.measure.block import Block
from cveff.measure.block_graph import block_model
from cveff.measure.kernel_profile import engine_module, profile, profile_overhead
from cveff.runtime.errors import first_line

LEAST = 0.1
"""Share of a kernel's profiled time that is left of it at least: no kernel is free."""

_REORDERS = ("ReorderInput", "ReorderOutput")


def engine_version(engine: str) -> str:
    """Version of an installed engine.

    Raises:
        EngineError: no such engine, or it is not installed.
    """
    return str(engine_module(engine).__version__).split("-")[0]


def measure_block(engine: str, block: Block, threads: int) -> float:
    """Milliseconds of the kernels that compute `block`: what a call usually takes, summed over kernels.

    Args:
        engine: "onnxruntime" or "openvino".
        threads: of the engine; keep the process to as many cores (`pinned_threads`).

    Raises:
        EngineError: the engine is unknown, not installed, or cannot run the block.
    """
    if engine == "openvino" and block.kind == "reorder":
        return 0.0  # it keeps one layout through the network
    model = block_model(block).SerializeToString()
    random = np.random.default_rng(0)
    inputs = {
        f"x{index}": random.integers(0, 256, shape, dtype=np.uint8)
        if block.kind == "input"
        else random.uniform(0.1, 1, shape).astype(np.float32)
        for index, shape in enumerate(block.inputs)
    }
    engine_module(engine)
    try:
        overhead = profile_overhead(engine, threads)
        kernels = profile(engine, model, inputs, threads)
    except Exception as error:  # engines' exceptions share no base class below Exception
        raise EngineError(f"{engine} cannot run the block {block.key!r}: {first_line(error)}") from error
    is_reorder = block.kind == "reorder"
    times = [
        max(kernel.milliseconds - overhead, LEAST * kernel.milliseconds)
        for kernel in kernels
        if (kernel.operator in _REORDERS) == is_reorder
    ]
    return sum(times) / 2 if is_reorder else sum(times)  # one way in, one way out: a crossing is one of them
