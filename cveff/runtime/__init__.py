"""Opens a bundle, checks it and runs it: numpy, Pillow and an engine; no torch anywhere below this folder,
unless the engine is AOTInductor, whose packages run on it.

The folder uses only relative imports, because every bundle carries a verbatim copy of it as `runtime/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Engine", "open"]


def open(
    path: str | Path, engine: str | None = None, threads: int | None = None, verify: bool = True
) -> Engine:
    """Open a bundle: check its manifest and every file's hash, then load the model. Or open an exported file.

        engine = cveff.runtime.open("my.bundle")
        probabilities = engine(engine.preprocess(["cat.jpg"]))

    Args:
        path: the bundle's folder, or a `.onnx` file written by `cveff.export`, which opens with ONNX Runtime.
        engine: "onnxruntime", "openvino", …: to use another of the shipped files than the fastest one; where
            one engine has several files, "openvino:int8" picks by precision. "tensorrt" runs any ONNX file, built
            when it is first opened on a machine.
        threads: threads of the engine; by default those the bundle was measured with, but no more than this
            process may use.
        verify: compare every file's SHA-256 with the manifest. Off, only the manifest, the paths and the
            sizes are checked.

    Raises:
        BundleError: missing, damaged, tampered with, or written by a newer cveff.
        EngineError: `engine` is not in the bundle or not installed, or cannot open the file.
    """
    from .engine import (
        Engine,
    )  # here, because every cveff error is defined beside us and must import in milliseconds

    return Engine.open(path, engine=engine, threads=threads, verify=verify)


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from .engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
