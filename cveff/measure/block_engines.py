"""How long an engine's kernels take for one `Block`, read from the engine's own profile.

A block alone is not a block inside a network: ONNX Runtime converts what goes into and comes out of a lone convolution
from and to its blocked layout, and a call costs some microseconds. The profile times every kernel by itself, so both
are left out. Weights are cold and activations warm, as in a network: between calls a buffer larger than a core's
second-level cache is written.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cveff.errors import EngineError
from cveff.measure.block import Block
from cveff.measure.block_graph import block_model
from cveff.runtime.errors import first_line

WARM, FEWEST, MOST = 3, 12, 60
"""Calls that are not counted; then at least and at most as many that are."""
BUDGET_MS = 80.0
"""Past this, only `FEWEST` calls."""
COLD_BYTES = 4 * 2**20

_REORDERS = ("ReorderInput", "ReorderOutput")
_NO_WORK = ("Parameter", "Result", "Input", "Output", "Constant", "Const", "Reorder")


def engine_version(engine: str) -> str:
    """Version of an installed engine.

    Raises:
        EngineError: no such engine, or it is not installed.
    """
    module = _module(engine)
    return str(module.__version__).split("-")[0]


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
    _module(engine)
    try:
        if engine == "onnxruntime":
            return _onnxruntime(model, inputs, threads, block.kind == "reorder")
        return _openvino(model, inputs, threads)
    except Exception as error:  # engines' exceptions share no base class below Exception
        raise EngineError(f"{engine} cannot run the block {block.key!r}: {first_line(error)}") from error


def _module(engine: str) -> Any:
    try:
        if engine == "onnxruntime":
            import onnxruntime

            return onnxruntime
        if engine == "openvino":
            import openvino

            return openvino
    except ImportError as error:
        raise EngineError(f"{engine} is not installed ({error}); pip install {engine}") from error
    raise EngineError(f"engine {engine!r} is unknown; known: onnxruntime, openvino")


def _onnxruntime(model: bytes, inputs: dict[str, np.ndarray], threads: int, reorders: bool) -> float:
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="cveff-block-") as folder:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "block")
        session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        _repeat(lambda: session.run(None, inputs))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in events:
        is_kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if is_kernel and (event["args"]["op_name"] in _REORDERS) == reorders:
            kernels[event["name"]].append(event["dur"] / 1000)
    total = sum(_typical(times[WARM:]) for times in kernels.values())
    return total / 2 if reorders else total  # one way in, one way out: a crossing is one of them


def _openvino(model: bytes, inputs: dict[str, np.ndarray], threads: int) -> float:
    import openvino

    core: Any = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERF_COUNT": True,
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    times: list[float] = []

    def call() -> None:
        request.infer(inputs)
        times.append(
            sum(
                item.real_time.total_seconds() * 1000
                for item in request.profiling_info
                if item.node_type not in _NO_WORK
            )
        )

    _repeat(call)
    return _typical(times[WARM:])


def _repeat(call: Callable[[], object]) -> None:
    """Call until there are enough: every call on cold weights."""
    cold = np.zeros(COLD_BYTES // 8)
    start, count = time.perf_counter(), 0
    while count < WARM + MOST:
        cold += 1.0
        call()
        count += 1
        if count >= WARM + FEWEST and (time.perf_counter() - start) * 1000 > BUDGET_MS:
            break


def _typical(times: list[float]) -> float:
    """The mean from the first tenth to the fourth: times that nothing else on the machine lengthened, and a mean,
    since profiles count whole microseconds."""
    ordered = np.sort(times)
    return float(ordered[len(ordered) // 10 : max(len(ordered) * 2 // 5, 1)].mean())
