"""OpenVINO: IR files (`.xml` + `.bin`) from exported ONNX files, and NNCF's int8 for OpenVINO and ONNX."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from cveff.errors import ExportError, MissingDependencyError
from cveff.export.calibration import check_calibration
from cveff.export.quantize import read_onnx
from cveff.files import atomic_path

Preset = Literal["performance", "mixed"]


def convert(source_onnx: str | Path, destination_xml: str | Path, *, compress_to_fp16: bool = False) -> Path:
    """Write an exported ONNX file as OpenVINO IR.

    Args:
        destination_xml: the `.xml` to write; the weights go beside it as `.bin`.
        compress_to_fp16: store weights in half precision: half the size, not bit-exact.

    Raises:
        MissingDependencyError: openvino is not installed.
        ExportError: OpenVINO cannot read the file.
    """
    source, destination = Path(source_onnx), _xml(destination_xml)
    proto = read_onnx(source)
    model = _read(proto, source)
    return _save(model, destination, compress_to_fp16)


def quantize_openvino(
    source_onnx: str | Path,
    destination_xml: str | Path,
    calibration: np.ndarray,
    *,
    preset: Preset | None = None,
    transformer: bool | None = None,
) -> Path:
    """Write an int8 OpenVINO IR made by NNCF's post-training quantization."""
    source, destination = Path(source_onnx), _xml(destination_xml)
    proto = read_onnx(source)
    check_calibration(calibration, proto)
    quantized = _nncf(_read(proto, source), proto, calibration, preset, transformer, source)
    return _save(quantized, destination, compress_to_fp16=False)


def quantize_onnx_nncf(
    source_onnx: str | Path,
    destination_onnx: str | Path,
    calibration: np.ndarray,
    *,
    preset: Preset | None = None,
    transformer: bool | None = None,
) -> Path:
    """Write an int8 (Q/DQ) ONNX file made by NNCF's post-training quantization."""
    source, destination = Path(source_onnx), Path(destination_onnx)
    proto = read_onnx(source)
    check_calibration(calibration, proto)
    # NNCF gives depthwise convolutions one activation scale a channel; ONNX Runtime's kernels take one a tensor.
    quantized = _nncf(proto, proto, calibration, preset, transformer, source, per_tensor_activations=True)
    with atomic_path(destination) as temporary:
        temporary.write_bytes(quantized.SerializeToString())
    return destination


def _nncf(
    model: Any,
    proto: onnx.ModelProto,
    calibration: np.ndarray,
    preset: Preset | None,
    transformer: bool | None,
    source: Path,
    per_tensor_activations: bool = False,
) -> Any:
    nncf = _require("nncf")
    is_transformer = has_attention(proto) if transformer is None else transformer
    if preset is None:
        preset = "mixed" if is_transformer or has_signed_activations(proto) else "performance"
    presets = {"performance": nncf.QuantizationPreset.PERFORMANCE, "mixed": nncf.QuantizationPreset.MIXED}
    advanced = None
    if per_tensor_activations:
        advanced = nncf.AdvancedQuantizationParameters(
            activations_quantization_params=nncf.quantization.advanced_parameters.QuantizationParameters(per_channel=False)
        )
    items = [calibration[index : index + 1] for index in range(len(calibration))]
    try:
        with _quiet(nncf):
            return nncf.quantize(
                model,
                nncf.Dataset(items, lambda image: {"images": image}),
                preset=presets[preset],
                subset_size=len(items),
                model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
                advanced_parameters=advanced,
            )
    except Exception as error:  # noqa: BLE001  (whatever NNCF raises is named and chained)
        raise ExportError(f"{source} cannot be quantized by NNCF: {type(error).__name__}: {error}") from error


def has_attention(proto: onnx.ModelProto) -> bool:
    """Whether the graph looks like a transformer: softmax between matrix products, with layer norms."""
    kinds = {node.op_type for node in proto.graph.node}
    return "Softmax" in kinds and "LayerNormalization" in kinds


def has_signed_activations(proto: onnx.ModelProto) -> bool:
    """Whether a layer's activation has a negative side (anything but ReLU), so that its range is lopsided."""
    kinds = {node.op_type for node in proto.graph.node}
    return bool(kinds & {"HardSwish", "Gelu", "Sigmoid", "Erf", "Elu", "Mish", "Swish", "LeakyRelu", "PRelu"})


def _read(proto: onnx.ModelProto, source: Path) -> Any:
    openvino = _require("openvino")
    try:
        return openvino.Core().read_model(source)
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot read {source}: {str(error).strip().splitlines()[-1]}") from error


def _save(model: Any, destination: Path, compress_to_fp16: bool) -> Path:
    openvino = _require("openvino")
    with tempfile.TemporaryDirectory(prefix="cveff-openvino-") as folder:
        written = Path(folder) / destination.name
        openvino.save_model(model, written, compress_to_fp16=compress_to_fp16)
        with atomic_path(destination) as xml, atomic_path(destination.with_suffix(".bin")) as weights:
            weights.write_bytes(written.with_suffix(".bin").read_bytes())
            xml.write_bytes(written.read_bytes())
    return destination


def _xml(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".xml":
        raise ExportError(f"{path} must end in .xml; OpenVINO finds the weights beside it by that name")
    return path


def _require(package: Literal["openvino", "nncf"]) -> Any:
    import importlib

    try:
        # NNCF reports its use over the network unless told not to; a user's models are no one's business.
        os.environ.setdefault("NNCF_CI", "1")
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"{package} is not installed; pip install 'cveff[openvino]'") from error


@contextmanager
def _quiet(nncf: Any) -> Iterator[None]:
    """NNCF draws progress bars and logs on standard output, which belongs to the caller."""
    level = nncf.nncf_logger.level
    nncf.set_log_level(40)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        nncf.set_log_level(level)
