"""What users get from the tools themselves: a plain `torch.onnx.export` file, and each tool's defaults on it.

The graph takes float NCHW images, already normalised, so peers are spared the uint8 conversion and normalisation
that a bundle does inside. Nothing of cveff's export is used here.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cveff.runtime.input_spec import InputSpec

FloatPredictor = Callable[[np.ndarray], np.ndarray]
"""float32 (N, C, H, W), normalised -> logits (N, classes)."""


def normalised(images: np.ndarray, spec: InputSpec) -> np.ndarray:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W), as the peers' graphs take it."""
    x = (images.astype(np.float32) / 255 - np.float32(spec.mean)) / np.float32(spec.std)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), dtype=np.float32)


def plain_export(module: nn.Module, spec: InputSpec, path: Path) -> Path:
    """`torch.onnx.export(dynamo=True)` with a dynamic batch and nothing else."""
    example = torch.zeros(2, spec.channels, *spec.size)
    with quiet():
        torch.onnx.export(
            module.eval(),
            (example,),
            str(path),
            dynamo=True,
            input_names=["x"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},),
            external_data=False,
        )
    return path


def onnxruntime_int8(
    source: Path, destination: Path, calibration: np.ndarray, method: str = "MinMax", arguments: bool = True
) -> Path:
    """ONNX Runtime's `quant_pre_process` and `quantize_static`: Q/DQ, U8 activations, S8 weights per channel.

    Args:
        arguments: off, `quantize_static` is called without any: S8 activations, one weight scale a tensor.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = iter({"x": calibration[i : i + 1]} for i in range(len(calibration)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.items, None)

    prepared = destination.with_suffix(".prepared.onnx")
    settings = {
        "quant_format": QuantFormat.QDQ,
        "per_channel": True,
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "calibrate_method": getattr(CalibrationMethod, method),
    }
    with quiet():
        quant_pre_process(str(source), str(prepared), auto_merge=True)
        quantize_static(str(prepared), str(destination), Reader(), **(settings if arguments else {}))
    prepared.unlink()
    return destination


def nncf_int8(source: Path, calibration: np.ndarray, preset: str | None = None) -> Any:
    """`nncf.quantize(openvino.convert_model(source), dataset)` with its defaults, or another preset."""
    import nncf
    import openvino

    items = [calibration[i : i + 1] for i in range(len(calibration))]
    extra = {} if preset is None else {"preset": nncf.QuantizationPreset(preset)}
    with quiet():
        nncf.set_log_level(logging.ERROR)
        return nncf.quantize(openvino.convert_model(str(source)), nncf.Dataset(items), **extra)


def nncf_onnx_int8(source: Path, destination: Path, calibration: np.ndarray) -> Path:
    """`nncf.quantize(onnx.load(source), dataset)` with its defaults: an ONNX file for any engine."""
    import nncf
    import onnx

    items = [{"x": calibration[i : i + 1]} for i in range(len(calibration))]
    with quiet():
        nncf.set_log_level(logging.ERROR)
        onnx.save(nncf.quantize(onnx.load(str(source)), nncf.Dataset(items)), str(destination))
    return destination


def open_onnxruntime(path: Path, threads: int, as_written: bool = False) -> FloatPredictor:
    """A session with ONNX Runtime's defaults but the number of threads.

    Args:
        as_written: without graph optimisations, so that what is rounded is computed in floats: what the file means.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def open_openvino(model: Any, threads: int, precision: str | None = None) -> FloatPredictor:
    """A model compiled for the CPU with OpenVINO's defaults but the number of threads (and `precision`, if given)."""
    import openvino

    if isinstance(model, Path):
        model = openvino.convert_model(str(model))
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if precision is not None:
        properties["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(model, "CPU", properties)
    return lambda x: np.array(compiled(x)[0])


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the tools' chatter from between the tables."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
