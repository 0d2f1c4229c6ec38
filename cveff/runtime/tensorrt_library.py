"""TensorRT's Python package: imported on use, its release checked, its messages sent to `logging`."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from .cuda import OUT_OF_MEMORY_ADVICE
from .errors import EngineError
from .tensorrt_settings import VERSIONS

_log = logging.getLogger(__name__)

_KEPT = 5
"""Last errors of TensorRT that an error of ours repeats."""


def load_tensorrt() -> Any:
    """The package `tensorrt`, of a release that this code was written for.

    Raises:
        EngineError: not installed, or another release; says what to install.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise EngineError(
            f"TensorRT is not installed ({error}); on a machine with an NVIDIA GPU: pip install tensorrt cuda-python "
            "(a Jetson has it from JetPack). Every other engine works without it"
        ) from error
    if major(trt) not in VERSIONS:
        raise EngineError(
            f"TensorRT {trt.__version__} is not supported; pip install 'tensorrt>={VERSIONS[0]},<{VERSIONS[-1] + 1}'"
        )
    return trt


def major(trt: Any) -> int:
    """Its major release."""
    return int(trt.__version__.split(".")[0])


def make_logger(trt: Any) -> Any:
    """A `trt.ILogger` that logs what TensorRT says, and whose `failure()` repeats its last errors."""
    errors: list[str] = []
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.INFO,  # of a hundred a build, none that a user could act on
        trt.ILogger.INFO: logging.DEBUG,
    }

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind refuses an object whose own base was not made

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity, logging.NOTSET)
            if level == logging.ERROR:
                errors.append(" ".join(msg.split())[:300])
                level = logging.INFO  # raised by whoever sees the failure
            if level:
                _log.log(level, "TensorRT: %s", msg)

        def failure(self) -> str:
            """What went wrong, and what to do if that is known."""
            said = "; ".join(dict.fromkeys(errors[-_KEPT:])) or "TensorRT gave no reason"
            is_full = any(word in said.lower() for word in ("out of memory", "outofmemory"))
            return f"out of GPU memory ({said}); {OUT_OF_MEMORY_ADVICE}" if is_full else said

    return Logger()
