"""Types of stored tensors, read without the onnx package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cveff.runtime.engines import open_file
from cveff.runtime.onnx_types import FLOAT8, stored_types


def rounded_relu(path: Path, kind: int, largest: float) -> Path:
    """images -> relu(images - 128) rounded to `kind` and back."""
    zero = helper.make_tensor("zero", kind, [], [0.0] if kind in FLOAT8 else [0])
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["x", "middle"], ["centred"]),
        helper.make_node("Relu", ["centred"], ["positive"]),
        helper.make_node("QuantizeLinear", ["positive", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "scale", "zero"], ["found"]),
        helper.make_node("ReduceMean", ["found", "planes"], ["logits"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 4, 4, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
        [
            zero,
            numpy_helper.from_array(np.float32(128), "middle"),
            numpy_helper.from_array(np.float32(128 / largest), "scale"),
            numpy_helper.from_array(np.array([1, 3]), "planes"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("kind", "largest"),
    [(TensorProto.FLOAT8E4M3FN, 448.0), (TensorProto.UINT8, 255.0), (TensorProto.INT8, 127.0)],
)
def test_a_relu_before_rounding_is_kept(tmp_path: Path, kind: int, largest: float) -> None:
    """ONNX Runtime 1.32 drops it before float8, where nothing else keeps values from below zero."""
    path = rounded_relu(tmp_path / "a.onnx", kind, largest)
    assert stored_types(path) == {kind, TensorProto.FLOAT, TensorProto.INT64}
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), dtype=np.uint8)
    with open_file("onnxruntime", path, threads=1) as session:
        found = session(images)
    expected = np.maximum(images.astype(np.float32) - 128, 0).mean(axis=(1, 3))
    # Half a step of either format at its largest value: 16 of 448, 1/2 of 127.
    assert np.abs(found - expected).max() <= 128 * max(16 / 448, 0.5 / 127)


def test_weights_beside_the_file_and_large_ones_are_passed_over(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.zeros((300, 300), np.float16), "w")
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [300, 300])],
        [weights],
    )
    path = tmp_path / "a.onnx"
    onnx.save(helper.make_model(graph), path, save_as_external_data=True, location="a.data")
    assert stored_types(path) == {TensorProto.FLOAT16}


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x3a\xff\xff\xff\xff\x0f", b"\x3f"])
def test_other_files_have_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    assert stored_types(path) == frozenset()
