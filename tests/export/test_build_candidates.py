"""Which file and which options a candidate's engine is given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto

import cveff
from cveff.data import Data, calibration_images
from cveff.export import build_candidates as module
from cveff.export.build_candidates import build_candidates
from cveff.export.int8 import Int8
from cveff.model import Model
from cveff.progress import Silent
from cveff.runtime.engines import ENGINES
from cveff.target import Target


def types(path: Path) -> set[int]:
    graph = onnx.load(path).graph
    return {item.data_type for item in graph.initializer}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Files and options that engines of a machine with all of them are opened with."""
    calls: dict[str, tuple[Path, dict[str, Any]]] = {}

    def open_file(engine: str, path: Path, *, threads: int, options: dict[str, Any]) -> Any:
        calls[f"{engine} {path.name}"] = (path, options)
        return SimpleNamespace(notes=(), close=lambda: None)

    monkeypatch.setattr(module, "available_engines", lambda: list(ENGINES))
    monkeypatch.setattr(module, "open_file", open_file)
    return calls


def test_gpu_providers_get_files_in_the_types_they_compute_in(
    digits_model: Model,
    digits: Data,
    tmp_path: Path,
    opened: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    assert digits.train is not None and digits.val is not None
    images = calibration_images(digits.train, digits_model.spec.input, 64, seed=0)
    source = cveff.export(digits_model, tmp_path / "model.onnx")
    pairs = tuple(
        (f"onnxruntime-{name}", kind) for name in ("cuda", "tensorrt") for kind in ("fp32", "fp16", "int8")
    )
    int8 = Int8(digits_model, images, tmp_path, digits.val, 1.0)
    built = build_candidates(source, Target("gpu", "", pairs), int8, tmp_path, Silent())
    assert [candidate.error for candidate in built.candidates] == [""] * 6
    assert {name: options for name, (_, options) in opened.items()} == {
        "onnxruntime-cuda model.onnx": {},
        "onnxruntime-cuda model.tensorrt-fp16.onnx": {},
        "onnxruntime-cuda model.int8.onnx": {},
        "onnxruntime-tensorrt model.onnx": {},
        "onnxruntime-tensorrt model.tensorrt-fp16.onnx": {"trt_fp16_enable": True},
        "onnxruntime-tensorrt model.tensorrt-int8.onnx": {"trt_fp16_enable": True, "trt_int8_enable": True},
    }
    half, whole = (tmp_path / f"model.tensorrt-{kind}.onnx" for kind in ("fp16", "int8"))
    assert TensorProto.FLOAT16 in types(half) and TensorProto.INT8 not in types(half)
    # TensorRT refuses zero points, which unsigned activations have.
    assert {TensorProto.FLOAT16, TensorProto.INT8} < types(whole) and TensorProto.UINT8 not in types(whole)
