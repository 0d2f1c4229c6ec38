"""Int8 for ONNX Runtime's CPU kernels: static quantization in Q/DQ form, calibrated on uint8 images."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx

from cveff.errors import ExportError
from cveff.export.calibration import batches, check_calibration
from cveff.export.graph import has_layer_norms, preprocessing_nodes, read_onnx
from cveff.files import atomic_path
from cveff.runtime.errors import first_line

Method = Literal["minmax", "entropy", "percentile"]
Activations = Literal["uint8", "int8"]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Kinds of nodes that hold nearly all of the work."""

ALL = (
    *WEIGHTED,
    *("Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Concat", "Split", "Resize", "Pad", "Where"),
    *("MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather"),
)
"""`WEIGHTED`, and what lies between so that a convolutional network stays in int8 from end to end."""


def quantize_onnx(
    source: str | Path,
    destination: str | Path,
    calibration: np.ndarray,
    *,
    method: Method = "minmax",
    activations: Activations = "uint8",
    reduce_range: bool = False,
    per_channel: bool = True,
    op_types: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Path:
    """Write a static int8 (Q/DQ) version of an exported file. The same calibration gives the same bytes.

    Matrix products take int8 and return float32: ONNX Runtime has a kernel for exactly that, while rounding
    their sums to 8 bits costs a pass over them and ruins a residual stream. Scaling and normalisation of the
    pixels stay in float32: the image is rounded once, at the first convolution.

    Args:
        source: a file written by `export`.
        destination: the file to write, atomically.
        calibration: (N, H, W, C) uint8; activations' ranges come from these images alone, seen in batches of 4.
        method: what of the values seen a range keeps: "minmax" all, "entropy" the least KL divergence,
            "percentile" 99.999 %.
        activations: "uint8" with a zero point (fast on x86), or "int8" symmetric (Arm, TensorRT, NPUs).
        reduce_range: 7-bit weights, for x86 without VNNI, whose 16-bit sums of 8-bit products saturate.
        per_channel: one weight scale an output channel.
        op_types: kinds of nodes that may compute in int8; by default `WEIGHTED` for networks with layer norms
            (transformers, ConvNeXt), whose other nodes gain nothing and lose accuracy, and `ALL` for the rest.
        exclude: names of nodes that stay in float32.

    Returns:
        `destination`.

    Raises:
        ExportError: an unknown setting or node name, unusable calibration images, or the quantizer failed.
    """
    source, destination = Path(source), Path(destination)
    proto = read_onnx(source)
    _check_settings(proto, method, activations, exclude)
    check_calibration(calibration, proto)
    kinds = tuple(op_types) if op_types is not None else (WEIGHTED if has_layer_norms(proto) else ALL)
    signed = activations == "int8"
    options = {
        "ActivationSymmetric": signed,
        "WeightSymmetric": True,
        "MatMulConstBOnly": True,
        "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
    }
    with tempfile.TemporaryDirectory(prefix="cveff-quantize-") as folder, _quiet():
        try:
            prepared = _prepare(proto, Path(folder))
            # The nodes' names are known only now: preparing merges some nodes and adds others.
            skipped = [*exclude, *preprocessing_nodes(onnx.load(prepared))]
            ranges = _ranges(prepared, Path(folder), calibration, method, kinds)
            quantized = _quantize(
                prepared, ranges, signed, reduce_range, per_channel, kinds, skipped, options
            )
        except Exception as error:
            raise ExportError(
                f"{source} cannot be quantized by ONNX Runtime: {type(error).__name__}: {first_line(error)}"
            ) from error
    if not any(node.op_type == "QuantizeLinear" for node in quantized.graph.node):
        raise ExportError(
            f"{source} has no node of kinds {', '.join(kinds)} left to quantize; nothing was written"
        )
    _copy_metadata(proto, quantized)
    with atomic_path(destination) as temporary:
        temporary.write_bytes(quantized.SerializeToString(deterministic=True))
    return destination


def _check_settings(proto: onnx.ModelProto, method: str, activations: str, exclude: Sequence[str]) -> None:
    if method not in get_args(Method):
        raise ExportError(
            f"calibration method {method!r} is unknown; use one of {', '.join(get_args(Method))}"
        )
    if activations not in get_args(Activations):
        raise ExportError(f"activations are {activations!r}; use one of {', '.join(get_args(Activations))}")
    unknown = sorted(set(exclude) - {node.name for node in proto.graph.node})
    if unknown:
        raise ExportError(
            f"nodes to exclude are not in the graph: {', '.join(unknown[:3])}; give names of its nodes"
        )


def _prepare(proto: onnx.ModelProto, folder: Path) -> Path:
    """Let ONNX Runtime fold what it can, and infer shapes: a tensor of unknown shape is not quantized.

    Symbolic inference is left out: it fails on some graphs (EdgeNeXt) and finds nothing more in an exported one.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, prepared = folder / "source.onnx", folder / "prepared.onnx"
    onnx.save(proto, source)
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    return prepared


def _ranges(prepared: Path, folder: Path, images: np.ndarray, method: Method, kinds: Sequence[str]) -> Any:
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator

    class OneBatch(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self, batch: np.ndarray) -> None:
            self.feeds = [{"images": batch}]

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override, unused-ignore]
            return self.feeds.pop() if self.feeds else None

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    calibrator = create_calibrator(
        prepared,
        list(kinds),
        str(folder / "augmented.onnx"),
        calibrate_method=methods[method],
        # The percentile method is symmetric by default, which gives half of a ReLU's codes to negative values.
        extra_options={"symmetric": False},
    )
    # One call a batch: the calibrator keeps every activation of a call in memory until the call ends.
    for batch in batches(images):
        calibrator.collect_data(OneBatch(batch))
    return calibrator.compute_data()


def _quantize(
    prepared: Path,
    ranges: Any,
    signed: bool,
    reduce_range: bool,
    per_channel: bool,
    kinds: Sequence[str],
    exclude: Sequence[str],
    options: Mapping[str, Any],
) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    quantizer = QDQQuantizer(
        load_model_with_shape_infer(prepared),
        per_channel,
        reduce_range,
        QuantType.QInt8,
        QuantType.QInt8 if signed else QuantType.QUInt8,
        ranges,
        [],
        list(exclude),
        list(kinds),
        dict(options),
    )
    quantizer.quantize_model()
    # ONNX wants its nodes sorted, and so do readers that walk them once; the quantizer appends its own at the end.
    quantizer.model.topological_sort()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def _copy_metadata(source: onnx.ModelProto, destination: onnx.ModelProto) -> None:
    del destination.metadata_props[:]
    destination.metadata_props.extend(source.metadata_props)
    destination.producer_name, destination.producer_version = source.producer_name, source.producer_version
    destination.graph.name = source.graph.name


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer logs to the root logger and prints its progress on standard output."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        root.setLevel(level)
