"""TensorRT on a machine without it: what is prepared all the same, and what is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from cveff.data.dataset import Data
from cveff.errors import CveffError, EngineError, ExportError
from cveff.export import build_candidates
from cveff.export.build_candidates import build_candidates as build
from cveff.export.bundle import write_bundle
from cveff.export.deploy import deploy
from cveff.export.int8 import Int8
from cveff.export.onnx import export
from cveff.export.tensorrt import build_plan
from cveff.export.trt_check import check_tensorrt
from cveff.model import Model
from cveff.progress import Silent
from cveff.runtime import engine
from cveff.runtime import open as open_bundle
from cveff.runtime.engines import open_file
from cveff.runtime.tensorrt_settings import TensorRT
from cveff.target import Target


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture
def files(digits_model: Model, digits: Data, tmp_path: Path) -> Int8:
    spec = digits_model.spec.input
    images = np.random.default_rng(0).integers(0, 256, (32, *spec.size, spec.channels), dtype=np.uint8)
    export(digits_model, tmp_path / "model.onnx")
    return Int8(digits_model, images, tmp_path, digits.val, 1.0)


@pytest.mark.parametrize(("precision", "kind"), [("fp16", TensorProto.FLOAT16), ("int8", TensorProto.INT8)])
def test_files_are_made_without_it(files: Int8, precision: str, kind: int) -> None:
    path = files.tensorrt(precision)
    assert path.name == f"model.tensorrt-{precision}.onnx"
    graph = onnx.load(path).graph
    assert kind in {item.data_type for item in graph.initializer}
    assert not check_tensorrt(path)
    assert (graph.input[0].name, graph.output[0].name) == ("images", "logits")
    written = path.stat().st_mtime_ns
    assert files.tensorrt(precision).stat().st_mtime_ns == written


def test_candidates_are_prepared_for_a_device_that_has_it(
    files: Int8, no_tensorrt: None, monkeypatch: pytest.MonkeyPatch, opens_float8: bool
) -> None:
    pairs = (("onnxruntime", "fp32"), ("tensorrt", "fp32"), ("tensorrt", "fp16"), ("tensorrt", "fp8"))
    target = Target("gpu", "a GPU", pairs, threads=1)
    for is_installed in (False, True):
        names = ("onnxruntime", *(("tensorrt",) if is_installed else ()))
        monkeypatch.setattr(build_candidates, "available_engines", lambda names=names: names)
        built = build(files.folder / "model.onnx", target, files, files.folder, Silent())
        built.close()
        assert list(built.sessions) == ["onnxruntime fp32"]
        assert list(built.stand_ins) == ["tensorrt fp32", "tensorrt fp16", *["tensorrt fp8"] * opens_float8]
        float32, half, small = built.candidates[1:]
        reason = "TensorRT is not installed" if is_installed else "pip install 'cveff[tensorrt]'"
        assert reason in half.error
        assert half.error.endswith(
            "model.tensorrt-fp16.onnx ships all the same: run.py --engine tensorrt:fp16 builds it on the device"
        )
        assert all(item.is_prepared for item in (float32, half, small))
        assert (float32.file, half.file) == ("model.onnx", "model.tensorrt-fp16.onnx")
        assert build_candidates.model_files(half, files.folder) == {half.file: half.path}


def test_a_bundle_made_without_it_brings_what_the_device_builds_from(
    digits_model: Model, digits: Data, tmp_path: Path, no_tensorrt: None, quick_timing: object
) -> None:
    pairs = (("tensorrt", "fp16"), ("tensorrt", "int8"), ("onnxruntime", "fp32"))
    target = Target("gpu", "a GPU", pairs, threads=1, batch_sizes=(1,))
    made = deploy(
        digits_model, data=digits, target=target, max_accuracy_drop=5, num_calibration=32, out=tmp_path / "b"
    )
    assert made.chosen["engine"] == "onnxruntime"
    half, small, _ = made.manifest["candidates"]
    for found in (half, small):
        assert found["rejected"] and found["latency_ms"] is None
        assert found["accuracy"] >= 0.9 and found["agreement"] >= 0.95, "as ONNX Runtime computes it"
    assert [(item["name"], item["file"]) for item in made.manifest["alternatives"]] == [
        ("tensorrt", "model.tensorrt-fp16.onnx"),
        ("tensorrt", "model.tensorrt-int8.onnx"),
    ]
    lines = (made.path / "requirements.txt").read_text().splitlines()
    assert not any(line.startswith(("tensorrt", "cuda")) for line in lines)
    assert any(line.startswith("# tensorrt") for line in lines)
    script = (made.path / "tensorrt" / "commands.sh").read_text()
    assert "--onnx=model.tensorrt-int8.onnx" in script and "--onnx=model.onnx" not in script
    with open_bundle(made.path) as opened:
        assert opened.name == "onnxruntime"
    with pytest.raises(EngineError, match="TensorRT is not installed"):
        open_bundle(made.path, engine="tensorrt:int8")


def test_wrong_names(tmp_path: Path, tiny_onnx: Path) -> None:
    with pytest.raises(ExportError, match=r"none\.onnx is not an ONNX file"):
        build_plan(tmp_path / "none.onnx")
    with pytest.raises(ExportError, match=r"engine\.trt is to be a plan; give a name that ends in \.plan"):
        build_plan(tiny_onnx, tmp_path / "engine.trt")
    with pytest.raises(EngineError, match="optimization_level of tensorrt is 9"):
        build_plan(tiny_onnx, tmp_path / "m.plan", TensorRT(optimization_level=9))


def test_it_is_not_installed(tmp_path: Path, tiny_onnx: Path, no_tensorrt: None) -> None:
    words = "TensorRT is not installed.*pip install tensorrt cuda-python.*Every other engine works without it"
    with pytest.raises(EngineError, match=words):
        build_plan(tiny_onnx, tmp_path / "m.plan")
    with pytest.raises(EngineError, match=words):
        open_file("tensorrt", tiny_onnx, threads=1)
    assert not (tmp_path / "m.plan").exists()


def test_any_bundle_can_be_asked_for_it(
    tmp_path: Path, tiny_bundle: Path, tiny_onnx: Path, manifest_maker: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[Any] = []

    def open_file(name: str, path: Path, *, threads: int, options: Any) -> Any:
        asked.append((name, path.name, dict(options)))
        raise EngineError("as far as this test goes")

    monkeypatch.setattr(engine, "open_file", open_file)
    with pytest.raises(EngineError, match="as far as"):
        open_bundle(tiny_bundle, engine="tensorrt")
    assert asked == [("tensorrt", "model.onnx", {})]
    with pytest.raises(CveffError, match="ships no file for engine 'tensorrt:int8'"):
        open_bundle(tiny_bundle, engine="tensorrt:int8")
    entry = {
        "name": "tensorrt",
        "precision": "fp16",
        "file": "half.onnx",
        "threads": 1,
        "options": {"batches": [1, 2, 4]},
    }
    files = {
        "model.onnx": tiny_onnx,
        "half.onnx": tiny_onnx,
        "half.plan": tiny_onnx,
        "half.plan.json": tiny_onnx,
    }
    manifest = manifest_maker(alternatives=[entry])
    monkeypatch.setattr("cveff.export.bundle._pin", lambda *names: f"{names[0]}==1")
    bundle = write_bundle(tmp_path / "gpu.bundle", manifest=manifest, files=files, report_html="<p></p>")
    asked.clear()
    with pytest.raises(EngineError, match="as far as"):
        open_bundle(bundle, engine="tensorrt:fp16")
    assert asked == [("tensorrt", "half.onnx", {"batches": [1, 2, 4]})]
