"""How long an engine's kernels take, by its own profile, and what that profile adds to them.

Both engines time kernels one by one, which takes time itself: nothing beside a large convolution, more than a tiny
kernel. `profile_overhead` measures how much, so that it can be taken off.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cveff.errors import EngineError

WARM, FEWEST, MOST = 3, 12, 60
"""Calls that are not counted; then at least and at most as many that are."""
BUDGET_MS = 80.0
"""Past this, only `FEWEST` calls."""
COLD_BYTES = 4 * 2**20
CHAIN = (4, 36)
"""Lengths of two chains of tiny products, whose difference is what a kernel costs where nothing is timed."""
CHAIN_CALLS = 600
ROUNDS = 3
TINY = 16

_NO_WORK = ("Parameter", "Result", "Input", "Output", "Constant", "Const", "Reorder")


@dataclass(frozen=True)
class Kernel:
    """One step of an engine.

    Attributes:
        operator: in the engine's words.
        milliseconds: as its profile says.
    """

    operator: str
    milliseconds: float


def engine_module(engine: str) -> Any:
    """The engine's package.

    Raises:
        EngineError: no such engine, or it is not installed.
    """
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


def profile(engine: str, model: bytes, inputs: Mapping[str, np.ndarray], threads: int) -> list[Kernel]:
    """The kernels of a model: what each usually takes in a call.

    Weights are cold and activations warm, as in a network: between calls a buffer larger than a core's second-level
    cache is written, and the inputs are read.
    """
    if engine == "onnxruntime":
        return _profile_onnxruntime(model, inputs, threads)
    return _profile_openvino(model, inputs, threads)


@functools.cache
def profile_overhead(engine: str, threads: int) -> float:
    """Milliseconds that the profile adds to a kernel: a tiny one, profiled alone, less what it costs in a chain of its
    like that nothing but the whole call is timed of.
    """
    return max(0.0, min(_overhead(engine, threads) for _ in range(ROUNDS)))


def tiny_chain(length: int, width: int = TINY) -> bytes:
    """So many products with one matrix, (width, width), behind one another: kernels that no engine merges."""
    weight = numpy_helper.from_array(np.eye(width, dtype=np.float32), "w")
    nodes = [helper.make_node("MatMul", [f"h{i}" if i else "x", "w"], [f"h{i + 1}"]) for i in range(length)]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width]) for name in ("x", f"h{length}")
    )
    graph = helper.make_graph(nodes, "chain", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _overhead(engine: str, threads: int) -> float:
    inputs = {"x": np.ones((1, TINY), np.float32)}
    profiled = sum(kernel.milliseconds for kernel in profile(engine, tiny_chain(1), inputs, threads))
    short, long = (_call(engine, tiny_chain(length), inputs, threads) for length in CHAIN)
    return profiled - (long - short) / (CHAIN[1] - CHAIN[0])


def _profile_onnxruntime(model: bytes, inputs: Mapping[str, np.ndarray], threads: int) -> list[Kernel]:
    with tempfile.TemporaryDirectory(prefix="cveff-block-") as folder:
        session = _onnxruntime(model, threads, Path(folder) / "block")
        _repeat(lambda: session.run(None, dict(inputs)), inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"], event["args"]["op_name"]].append(event["dur"] / 1000)
    return [Kernel(operator, _typical(found[WARM:])) for (_, operator), found in times.items()]


def _profile_openvino(model: bytes, inputs: Mapping[str, np.ndarray], threads: int) -> list[Kernel]:
    request = _openvino(model, threads, is_profiled=True)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)

    def call() -> None:
        request.infer(dict(inputs))
        for item in request.profiling_info:
            if item.node_type not in _NO_WORK:
                milliseconds = item.real_time.total_seconds() * 1000
                times[item.node_name, item.node_type].append(milliseconds)

    _repeat(call, inputs)
    # What the engine fused into another node is listed too, with no time of its own.
    kernels = [Kernel(operator, _typical(found[WARM:])) for (_, operator), found in times.items()]
    return [kernel for kernel in kernels if kernel.milliseconds > 0]


def _call(engine: str, model: bytes, inputs: Mapping[str, np.ndarray], threads: int) -> float:
    """Milliseconds a whole call usually takes, nothing else being timed."""
    run: Callable[[], object]
    if engine == "onnxruntime":
        session = _onnxruntime(model, threads)
        run = lambda: session.run(None, dict(inputs))  # noqa: E731
    else:
        request = _openvino(model, threads)
        run = lambda: request.infer(dict(inputs))  # noqa: E731
    times = []
    for _ in range(CHAIN_CALLS):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1000)
    return _typical(times[CHAIN_CALLS // 10 :])


def _onnxruntime(model: bytes, threads: int, profiled_to: Path | None = None) -> Any:
    onnxruntime = engine_module("onnxruntime")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    if profiled_to is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profiled_to)
    return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def _openvino(model: bytes, threads: int, is_profiled: bool = False) -> Any:
    core = engine_module("openvino").Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERF_COUNT": is_profiled,
    }
    return core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()


def _repeat(call: Callable[[], object], inputs: Mapping[str, np.ndarray]) -> None:
    """Call until there are enough: every call on cold weights."""
    cold = np.zeros(COLD_BYTES // 8)
    start, count = time.perf_counter(), 0
    while count < WARM + MOST:
        cold += 1.0
        for values in inputs.values():
            values.max()
        call()
        count += 1
        if count >= WARM + FEWEST and (time.perf_counter() - start) * 1000 > BUDGET_MS:
            break


def _typical(times: list[float]) -> float:
    """The mean from the first tenth to the fourth: times that nothing else on the machine lengthened, and a mean,
    since profiles count whole microseconds."""
    ordered = np.sort(times)
    return float(ordered[len(ordered) // 10 : max(len(ordered) * 2 // 5, 1)].mean())
