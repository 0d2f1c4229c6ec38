"""Which engines there are, and one function that opens a model file with any of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import EngineError
from .machine import usable_cores
from .session import Session

ENGINES = ("onnxruntime", "openvino", "tensorrt")

_SUFFIXES = {"onnxruntime": (".onnx",), "openvino": (".xml", ".onnx"), "tensorrt": (".plan", ".onnx")}


def available_engines() -> tuple[str, ...]:
    """Names of the engines that are installed here."""
    return tuple(name for name in ENGINES if importlib.util.find_spec(name) is not None)


def open_file(
    engine: str, path: str | Path, *, threads: int, options: Mapping[str, Any] | None = None
) -> Session:
    """Open a model file for prediction.

    Args:
        engine: "onnxruntime" (`.onnx`), "openvino" (`.xml` or `.onnx`) or "tensorrt" (`.onnx`, built into a plan when
            it is first opened on a machine, or `.plan`).
        threads: threads of the engine; 0 means every core this process may use.
        options: the engine's own: "graph_optimizations" of ONNX Runtime, "inference_precision" of OpenVINO, how a
            TensorRT plan is built (`TensorRT`'s fields).

    Raises:
        EngineError: unknown or not installed engine, unknown option, or a file it cannot open.
    """
    path = Path(path)
    if engine not in ENGINES:
        raise EngineError(f"engine {engine!r} is unknown; known: {', '.join(ENGINES)}")
    if not isinstance(threads, int) or threads < 0:
        raise EngineError(f"threads is {threads!r}; give a positive integer, or 0 for every core")
    if not path.is_file():
        raise EngineError(f"model file {path} does not exist; check the path")
    if path.suffix not in _SUFFIXES[engine]:
        raise EngineError(f"{engine} opens {' and '.join(_SUFFIXES[engine])} files, not {path.name}")
    threads = threads or usable_cores()
    # Each engine's module is imported on use: a bundle needs one of them installed, not both.
    if engine == "onnxruntime":
        from .onnx_session import OnnxSession

        return OnnxSession(path, threads, options)
    if engine == "tensorrt":
        from .tensorrt_session import TensorRTSession

        return TensorRTSession(path, threads, options)
    from .openvino_session import OpenVinoSession

    return OpenVinoSession(path, threads, options)
