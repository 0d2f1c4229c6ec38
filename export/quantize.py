"""Int8 for ONNX Runtime's CPU kernels: static quantization in Q/DQ form, calibrated on uint8 images."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from cveff.errors import ExportError
from cveff.export.calibration import batches, check_calibration
from cveff.files import atomic_path

Method = Literal["minmax", "entropy", "percentile"]
OP_TYPES = ("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool",
            "Relu", "Clip", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Pad", "Resize", "Split",
            "Slice", "Gather")  # fmt: skip


def quantize_onnx(
    source: str | Path,
    destination: str | Path,
    calibration: np.ndarray,
    *,
    method: Method = "minmax",
    activations: Literal["uint8", "int8"] = "uint8",
    reduce_range: bool = False,
    per_channel: bool = True,
    op_types: Sequence[str] = OP_TYPES,
    exclude: Sequence[str] = (),
) -> Path:
    """Write a static int8 (Q/DQ) version of an exported file.

    Args:
        source: a file written by `export`.
        destination: the file to write, atomically.
        calibration: (N, H, W, C) uint8; activations' ranges come from these images alone.
        method: how a range is chosen from what was seen: all of it, least KL divergence, or 99.999 %.
        activations: "uint8" with a zero point, or "int8" symmetric (what TensorRT and some NPUs want).
        reduce_range: 7-bit weights, for CPUs whose 8-bit products saturate (x86 without VNNI).
        per_channel: one weight scale an output channel.
        op_types: kinds of nodes that may compute in int8.
        exclude: names of nodes that stay in float32.

    Returns:
        `destination`.

    Raises:
        ExportError: unusable calibration images, or the quantizer failed.
    """
    source, destination = Path(source), Path(destination)
    proto = read_onnx(source)
    check_calibration(calibration, proto)
    with tempfile.TemporaryDirectory(prefix="cveff-quantize-") as folder, _quiet():
        try:
            prepared = _prepare(proto, Path(folder))
            ranges = _ranges(prepared, Path(folder), calibration, method, op_types)
            quantized = _quantize(
                onnx.load(prepared), ranges, activations, reduce_range, per_channel, op_types,
                [*exclude, *preprocessing_nodes(proto)],
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001  (whatever the quantizer raises is named and chained)
            raise ExportError(f"{source} cannot be quantized by ONNX Runtime: {_reason(error)}") from error
    quantized.metadata_props.extend(proto.metadata_props)
    with atomic_path(destination) as temporary:
        temporary.write_bytes(quantized.SerializeToString())
    return destination


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        ExportError: it does not exist or is not one.
    """
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ExportError(f"{path} does not exist; export the model first")
    try:
        proto = onnx.load(path)
    except (DecodeError, OSError, onnx.checker.ValidationError) as error:
        raise ExportError(f"{path} is not an ONNX file ({_reason(error)}); export the model again") from error
    if len(proto.graph.input) != 1:
        raise ExportError(f"{path} has {len(proto.graph.input)} inputs; one, of uint8 images, is expected")
    return proto


def preprocessing_nodes(proto: onnx.ModelProto) -> list[str]:
    """Names of the nodes between the input and the first weighted layer: int8 would only round the pixels twice."""
    from_input = {item.name for item in proto.graph.input}
    names = []
    for node in proto.graph.node:
        if node.op_type in ("Transpose", "Cast", "Sub", "Mul", "Add") and any(name in from_input for name in node.input):
            names.append(node.name)
            from_input.update(node.output)
    return names


def _prepare(proto: onnx.ModelProto, folder: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, prepared = folder / "source.onnx", folder / "prepared.onnx"
    onnx.save(proto, source)
    quant_pre_process(source, prepared, skip_optimization=False, auto_merge=True)
    return prepared


def _ranges(prepared: Path, folder: Path, images: np.ndarray, method: Method, op_types: Sequence[str]) -> Any:
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator

    class OneBatch(CalibrationDataReader):
        def __init__(self, batch: np.ndarray) -> None:
            self.feeds: list[dict[str, np.ndarray]] = [{"images": batch}]

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            return self.feeds.pop() if self.feeds else None

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    calibrator = create_calibrator(
        prepared, list(op_types), str(folder / "augmented.onnx"), calibrate_method=methods[method],
        extra_options={"symmetric": False},
    )  # fmt: skip
    # One call a batch: the calibrator keeps every activation of a call in memory until the call ends.
    for batch in batches(images):
        calibrator.collect_data(OneBatch(batch))
    return calibrator.compute_data()


def _quantize(
    proto: onnx.ModelProto,
    ranges: Any,
    activations: str,
    reduce_range: bool,
    per_channel: bool,
    op_types: Sequence[str],
    exclude: Sequence[str],
) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    signed = activations == "int8"
    quantizer = QDQQuantizer(
        proto, per_channel, reduce_range, QuantType.QInt8, QuantType.QInt8 if signed else QuantType.QUInt8,
        ranges, [], list(exclude), list(op_types), {"ActivationSymmetric": signed, "WeightSymmetric": True},
    )  # fmt: skip
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # ONNX asks for it; the quantizer appends its nodes at the end
    return quantizer.model.model


@contextmanager
def _quiet() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return f"{type(error).__name__}: {next((line for line in lines if line), 'no message')}"
