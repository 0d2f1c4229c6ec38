"""Which engines there are, and one function that opens a model file with any of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import EngineError
from .machine import usable_cores
from .onnx_providers import PROVIDERS
from .session import Session

ENGINES = (
    "onnxruntime",
    "openvino",
    "tensorrt",
    "aot-inductor",
    *PROVIDERS,
)

_MODULES = {"openvino": "openvino", "tensorrt": "tensorrt", "aot-inductor": "torch"}
"""What is to be imported; of others onnxruntime."""
_SUFFIXES = {"openvino": (".xml", ".onnx"), "tensorrt": (".plan", ".onnx"), "aot-inductor": (".pt2",)}
"""What they open; others .onnx."""


def available_engines() -> tuple[str, ...]:
    """Names of the engines that are installed here; of ONNX Runtime's providers, those it was built with."""
    return tuple(name for name in ENGINES if _is_available(name))


def opens(engine: str, path: str | Path) -> bool:
    """Whether files with this name's suffix are of a kind that the engine opens."""
    return Path(path).suffix in _SUFFIXES.get(engine, (".onnx",))


def open_file(
    engine: str, path: str | Path, *, threads: int, options: Mapping[str, Any] | None = None
) -> Session:
    """Open a model file for prediction.

    Args:
        engine: one of `ENGINES`: "onnxruntime" and its execution providers (`.onnx`), "openvino" (`.xml` or
            `.onnx`), "tensorrt" (`.onnx`, built into a plan when it is first opened on a machine, or `.plan`),
            "aot-inductor" (`.pt2`).
        threads: threads of the engine; 0 means every core this process may use.
        options: the engine's own: those of `OnnxSession`, `OpenVinoSession`, `TensorRTSession`, `AotSession`.

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
    if not opens(engine, path):
        kinds = " and ".join(_SUFFIXES.get(engine, (".onnx",)))
        raise EngineError(f"{engine} opens {kinds} files, not {path.name}")
    threads = threads or usable_cores()
    # Each engine's module is imported on use: a bundle needs one of them installed, not all.
    if engine == "openvino":
        from .openvino_session import OpenVinoSession

        return OpenVinoSession(path, threads, options)
    if engine == "tensorrt":
        from .tensorrt_session import TensorRTSession

        return TensorRTSession(path, threads, options)
    if engine == "aot-inductor":
        from .aot_session import AotSession

        return AotSession(path, threads, options)
    from .onnx_session import OnnxSession

    return OnnxSession(path, threads, options, engine)


def _is_available(name: str) -> bool:
    if importlib.util.find_spec(_MODULES.get(name, "onnxruntime")) is None:
        return False
    if name not in PROVIDERS:
        return True
    import onnxruntime

    return PROVIDERS[name].name in onnxruntime.get_available_providers()
