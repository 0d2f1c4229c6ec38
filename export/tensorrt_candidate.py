"""What `deploy` builds for TensorRT: an ONNX file in the types that are to be computed in, and its plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cveff.errors import EngineError, MissingDependencyError
from cveff.export.int8 import Int8
from cveff.export.tensorrt import build_plan
from cveff.export.trt_check import require_tensorrt
from cveff.runtime.cuda import Cuda
from cveff.runtime.tensorrt_library import load_tensorrt
from cveff.runtime.tensorrt_settings import TensorRT


def build_candidate(
    precision: str, source: Path, int8: Int8, settings: TensorRT
) -> tuple[Path, dict[str, Any]]:
    """The ONNX file of a precision with its plan beside it, and the options that its session takes.

    Args:
        precision: one of `cveff.target.PRECISIONS`.
        source: the exported float32 file.
        int8: the same model, and its calibration images.

    Raises:
        MissingDependencyError: this machine lacks TensorRT or a GPU; `prepare_candidate` needs neither.
        ExportError: a graph that TensorRT does not take.
        EngineError, StepError: see `build_plan` and `Int8.tensorrt`.
    """
    try:
        load_tensorrt()
        Cuda()
    except EngineError as error:
        raise MissingDependencyError(str(error)) from error
    onnx, options = prepare_candidate(precision, source, int8, settings)
    build_plan(onnx, settings=settings, progress=int8.progress)
    return onnx, options


def prepare_candidate(
    precision: str, source: Path, int8: Int8, settings: TensorRT
) -> tuple[Path, dict[str, Any]]:
    """The same without a plan, which the device builds when it first opens the file.

    Raises:
        ExportError, StepError: as `build_candidate`.
    """
    onnx = source if precision == "fp32" or int8.is_given else int8.tensorrt(precision)
    require_tensorrt(onnx, settings.version)
    # The release is left out: on another device, what is installed there builds.
    return onnx, {key: value for key, value in asdict(settings).items() if key != "version"}
