"""Small model files and bundles, made without torch, for every room's tests."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

# The same examples everywhere: what fails on one machine fails on all. `--hypothesis-profile=default` looks further.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

SIZE = (32, 40)
NUM_CLASSES = 5


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first: one of minutes at the end would leave the other workers idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup() -> None:
    """What a test draws without a generator of its own does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def opens_float8() -> bool:
    """Whether this ONNX Runtime computes float8 files: since 1.32."""
    import onnxruntime

    return tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) >= (1, 32)


def make_onnx(
    path: Path,
    *,
    size: tuple[int, int] = SIZE,
    channels: int = 3,
    num_classes: int = NUM_CLASSES,
    batch: int | str = "N",
    dtype: str = "UINT8",
    scale: float = 1.0,
    seed: int = 0,
) -> Path:
    """An ONNX file with the graph cveff exports: `images` uint8 NHWC -> `logits` float32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    weights = {
        "scale": np.float32(1 / 255),
        "kernel": rng.normal(size=(8, channels, 3, 3)).astype(np.float32) / 3,
        "head": scale * rng.normal(size=(8, num_classes)).astype(np.float32),
        "bias": rng.normal(size=(num_classes,)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["features"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["features"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", getattr(TensorProto, dtype), [batch, *size, channels])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, num_classes])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def make_openvino(path: Path, source: Path) -> Path:
    """`source` converted to OpenVINO IR: `path` and the `.bin` beside it."""
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.convert_model(str(source)), str(path), compress_to_fp16=False)
    return path


def make_manifest(**changes: Any) -> dict[str, Any]:
    """A manifest that fits `make_onnx`'s file, without `schema_version` and `files`."""
    manifest: dict[str, Any] = {
        "model": {"name": "tiny net", "architecture": "tiny", "parameters": 269, "edits": []},
        "task": "classification",
        "input": {
            "size": list(SIZE),
            "channels": 3,
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
            "interpolation": "bicubic",
            "crop": 0.875,
            "enlarge": False,
            "crop_mode": "center",
        },
        "labels": ["cat", "dog", "bird", "fish", "tree"],
        "engine": {
            "name": "onnxruntime",
            "file": "model.onnx",
            "threads": 1,
            "options": {},
            "precision": "fp32",
        },
        "alternatives": [],
        "metrics": {
            "accuracy": {"reference": 0.9, "deployed": 0.89},
            "agreement": 0.99,
            "parity": {"max_relative_difference": 1e-6},
            "latency_ms": {"batch": 1, "threads": 1, "median": 0.2, "p90": 0.3, "reference_median": 1.0},
            "peak_rss_bytes": 90_000_000,
            "size_bytes": 2000,
            "images": {"split": "val", "count": 100},
        },
        "candidates": [
            {
                "engine": "onnxruntime",
                "precision": "fp32",
                "accuracy": 0.89,
                "agreement": 0.99,
                "latency_ms": 0.2,
                "size_bytes": 2000,
                "chosen": True,
                "why": "fastest",
            }
        ],
        "recipe": None,
        "versions": {"cveff": "0.1.0"},
        "machine": {"cpu": "test", "cores": 1, "isa": []},
    }
    return {**manifest, **changes}


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny ONNX file."""
    return make_onnx(tmp_path_factory.mktemp("tiny") / "model.onnx")


@pytest.fixture(scope="session")
def tiny_xml(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path) -> Path:
    """The same network as OpenVINO IR."""
    return make_openvino(tmp_path_factory.mktemp("tiny") / "model.xml", tiny_onnx)


@pytest.fixture
def tiny_bundle(tmp_path: Path, tiny_onnx: Path, tiny_xml: Path) -> Path:
    """A bundle with ONNX Runtime chosen and OpenVINO beside it."""
    from cveff.export.bundle import write_bundle

    alternative = {"name": "openvino", "precision": "fp32", "file": "model.xml", "threads": 1, "options": {}}
    files = {"model.onnx": tiny_onnx, "model.xml": tiny_xml, "model.bin": tiny_xml.with_suffix(".bin")}
    manifest = make_manifest(alternatives=[alternative])
    return write_bundle(tmp_path / "my.bundle", manifest=manifest, files=files, report_html="<p>figures</p>")


@pytest.fixture
def onnx_maker() -> Callable[..., Path]:
    """`make_onnx`, for tests that need another graph."""
    return make_onnx


@pytest.fixture(scope="module")
def quick_stages() -> Iterator[None]:
    """Short comparisons of stages: tests do not assert times."""
    from cveff.export import deploy_exits, staged

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (staged, "STAGE_SECONDS"),
            (staged, "STREAM_SECONDS"),
            (deploy_exits, "ENGINE_SECONDS"),
        ):
            patch.setattr(module, name, 0.05)
        yield


@pytest.fixture
def manifest_maker() -> Callable[..., dict[str, Any]]:
    """`make_manifest`, for tests that need another manifest."""
    return make_manifest


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a script of tools/benchmarks as if it ran there."""
    folder = Path(__file__).parents[1] / "tools" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for script in folder.glob("*.py"):
        sys.modules.pop(script.stem, None)
