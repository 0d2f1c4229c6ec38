"""What `deploy` builds for TensorRT: an ONNX file in the types that are to be computed in, and its plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cveff.errors import ExportError
from cveff.export.int8 import Int8
from cveff.export.tensorrt import build_plan
from cveff.export.trt_check import require_tensorrt
from cveff.runtime.cuda import Cuda
from cveff.runtime.tensorrt_library import load_tensorrt
from cveff.runtime.tensorrt_settings import TensorRT

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


def build_candidate(
    precision: str, source: Path, int8: Int8, settings: TensorRT
) -> tuple[Path, dict[str, Any]]:
    """The ONNX file of a precision with its plan beside it, and the options that its session takes.

    Args:
        precision: one of `PRECISIONS`.
        source: the exported float32 file.
        int8: the same model, and its calibration images.

    Raises:
        ExportError: another precision, or a graph that TensorRT does not take.
        EngineError, StepError: see `build_plan` and `Int8.tensorrt`.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"TensorRT's files do not come in {precision}; give {', '.join(PRECISIONS)}")
    load_tensorrt()
    Cuda()  # a machine that lacks either says so before anything is calibrated
    onnx = source if precision == "fp32" or int8.is_given else int8.tensorrt(precision)
    require_tensorrt(onnx, settings.version)
    build_plan(onnx, settings=settings, progress=int8.progress)
    # The release is left out: on another device, what is installed there builds.
    return onnx, {key: value for key, value in asdict(settings).items() if key != "version"}
