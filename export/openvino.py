"""OpenVINO: IR files (`.xml` + `.bin`) from exported ONNX files, and NNCF's int8 for OpenVINO."""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx

from cveff.errors import ExportError, MissingDependencyError
from cveff.export.calibration import check_calibration
from cveff.export.graph import (
    has_attention,
    has_signed_activations,
    preprocessing_nodes,
    read_onnx,
)
from cveff.files import atomic_path
from cveff.runtime.errors import first_line

Preset = Literal["performance", "mixed"]


def convert(source_onnx: str | Path, destination_xml: str | Path, *, compress_to_fp16: bool = False) -> Path:
    """Write an exported ONNX file as OpenVINO IR.

    Args:
        destination_xml: the `.xml` to write; the weights go beside it as `.bin`. Both appear, or neither.
        compress_to_fp16: store the weights in half precision: half the size, no longer bit-exact.

    Returns:
        `destination_xml`.

    Raises:
        MissingDependencyError: openvino is not installed.
        ExportError: OpenVINO cannot read the file, or the destination does not end in .xml.
    """
    source, destination = Path(source_onnx), _xml(destination_xml)
    read_onnx(source)
    return _save(_read(source), destination, compress_to_fp16)


def quantize_openvino(
    source_onnx: str | Path,
    destination_xml: str | Path,
    calibration: np.ndarray,
    *,
    preset: Preset | None = None,
    transformer: bool | None = None,
    smooth: bool | None = None,
    fast_bias_correction: bool = True,
    half_range: bool = False,
) -> Path:
    """Write an int8 OpenVINO IR made by NNCF's post-training quantization (weights a channel, static activations).

    Args:
        destination_xml: the `.xml` to write; the weights go beside it as `.bin`. Both appear, or neither.
        calibration: (N, H, W, C) uint8, every image used, one at a time.
        preset: "performance" (symmetric activations) or "mixed" (asymmetric); by default "mixed" where an
            activation function has a negative side (hard-swish, GELU, …), else "performance".
        transformer: whether to use NNCF's rules for transformers; by default whether the graph has attention.
        smooth: whether to move outlying channels of activations into weights (SmoothQuant, Xiao et al., ICML
            2023); by default both are built for transformers, and the one whose logits stay closer to the
            source's on (up to 32 of) the calibration images is kept. It helps where a few channels
            dominate and can ruin a network where none do (Swin).
        fast_bias_correction: correct each layer's mean from its own inputs alone; off, from the quantized
            network's: slower, often a little better.
        half_range: round the weights of every layer to 7 bits: for x86 without VNNI, whose 16-bit
            sums of 8-bit products clip.

    Returns:
        `destination_xml`.

    Raises:
        MissingDependencyError: openvino or nncf is not installed.
        ExportError: unusable calibration images or settings, or NNCF failed.
    """
    source, destination = Path(source_onnx), _xml(destination_xml)
    proto = read_onnx(source)
    check_calibration(calibration, proto)
    variants = _settings(proto, preset, transformer, smooth, fast_bias_correction, half_range=half_range)
    models = [_nncf(_read(source), calibration, settings, source) for settings in variants]
    return _save(_closest(models, _read(source), calibration), destination, compress_to_fp16=False)


def _settings(
    proto: onnx.ModelProto,
    preset: Preset | None,
    transformer: bool | None,
    smooth: bool | None,
    fast_bias_correction: bool,
    half_range: bool = False,
) -> list[dict[str, Any]]:
    """`nncf.quantize`'s arguments; two sets of them where `smooth` is to be decided by trying."""
    if preset is not None and preset not in get_args(Preset):
        raise ExportError(f"preset {preset!r} is unknown; use one of {', '.join(get_args(Preset))}")
    nncf = _require("nncf")
    advanced = _require("nncf.quantization.advanced_parameters")
    if transformer is None:
        transformer = has_attention(proto)
    if preset is None:
        preset = "mixed" if transformer or has_signed_activations(proto) else "performance"
    presets = {"performance": nncf.QuantizationPreset.PERFORMANCE, "mixed": nncf.QuantizationPreset.MIXED}
    off = advanced.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    # NNCF smooths transformers alone.
    choices = (False,) if not transformer else (False, True) if smooth is None else (smooth,)
    return [
        {
            "preset": presets[preset],
            "model_type": nncf.ModelType.TRANSFORMER if transformer else None,
            "fast_bias_correction": fast_bias_correction,
            "ignored_scope": nncf.IgnoredScope(names=preprocessing_nodes(proto), validate=False),
            "advanced_parameters": advanced.AdvancedQuantizationParameters(
                **({} if choice else {"smooth_quant_alphas": off}),
                **({"overflow_fix": advanced.OverflowFix.ENABLE} if half_range else {}),
            ),
        }
        for choice in choices
    ]


def _closest(models: Sequence[Any], source: Any, calibration: np.ndarray) -> Any:
    """The model whose logits are closest to `source`'s, by the sum of squares over a few calibration images."""
    if len(models) == 1:
        return models[0]
    images = calibration[:32]
    expected = _answers(source, images)
    errors = [float(np.square(_answers(model, images) - expected).sum()) for model in models]
    return models[int(np.argmin(errors))]


def _answers(model: Any, images: np.ndarray) -> np.ndarray:
    openvino = _require("openvino")
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled(image[None])[0] for image in images])


def _nncf(model: Any, calibration: np.ndarray, settings: dict[str, Any], source: Path) -> Any:
    nncf = _require("nncf")
    # One image a step: NNCF's statistics count samples, and memory stays that of one image.
    samples = [calibration[index : index + 1] for index in range(len(calibration))]
    dataset = nncf.Dataset(samples, lambda image: {"images": image})
    try:
        with _quiet(nncf):
            return nncf.quantize(model, dataset, subset_size=len(samples), **settings)
    except Exception as error:
        raise ExportError(
            f"{source} cannot be quantized by NNCF: {type(error).__name__}: {first_line(error)}"
        ) from error


def _read(source: Path) -> Any:
    openvino = _require("openvino")
    try:
        # Not read_model: it leaves grouped kernels behind a Reshape, which keeps depthwise convolutions from int8.
        with _environment("CI", "true"):  # convert_model reports its use over the network, but not from CI
            return openvino.convert_model(source)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ExportError(f"OpenVINO cannot read {source}: {reason.removeprefix('-- ')}") from error


def _save(model: Any, destination: Path, compress_to_fp16: bool) -> Path:
    openvino = _require("openvino")
    weights = destination.with_suffix(".bin")
    with tempfile.TemporaryDirectory(prefix="cveff-openvino-") as folder:
        written = Path(folder) / destination.name
        openvino.save_model(model, written, compress_to_fp16=compress_to_fp16)
        had_weights = weights.exists()
        try:
            # The .xml is renamed last: where it is, its weights are.
            with atomic_path(destination) as new_xml:
                new_xml.write_bytes(written.read_bytes())
                with atomic_path(weights) as new_weights:
                    new_weights.write_bytes(written.with_suffix(".bin").read_bytes())
        except BaseException:
            if not had_weights:
                weights.unlink(missing_ok=True)
            raise
    return destination


def _xml(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".xml":
        raise ExportError(f"{path} must end in .xml; OpenVINO finds the weights beside it by that name")
    return path


def _require(module: str) -> Any:
    """Import an optional package; NNCF without the report of its use that it sends over the network."""
    package = module.split(".")[0]
    try:
        # NNCF looks at this variable once, when it is first imported.
        with _environment("NNCF_CI", "1"):
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"{package} is not installed; pip install 'cveff[openvino]'") from error


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable, for the time of the block; one that the user has set stays as it is."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


@contextmanager
def _quiet(nncf: Any) -> Iterator[None]:
    """NNCF draws progress bars and logs on standard output, which belongs to the caller.

    It also imports torch's builder of C++ extensions, which warns of a CUDA compiler without a CUDA device;
    nothing is built here.
    """
    levels = [(handler, handler.level) for handler in nncf.nncf_logger.handlers]
    level = nncf.nncf_logger.level
    builder = logging.getLogger("torch.utils.cpp_extension")
    builder_level = builder.level
    nncf.set_log_level(logging.ERROR)
    builder.setLevel(logging.ERROR)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        builder.setLevel(builder_level)
        nncf.nncf_logger.setLevel(level)
        for handler, old in levels:
            handler.setLevel(old)
