"""Tiny ONNX graphs in the shape of what cveff exports: uint8 NHWC `images` in, float32 `logits` out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

CHANNELS, CLASSES, SIDE = 8, 6, 12


def build(damage: str | None = None, prefix: str = "") -> onnx.ModelProto:
    """conv1 → relu1 → conv2 → relu2 → conv3 → pool → logits; `damage` names the layer whose weight is changed."""
    generator = np.random.default_rng(0)
    weights = {
        "conv1": generator.normal(0, 0.3, (CHANNELS, 3, 3, 3)),
        "conv2": generator.normal(0, 0.2, (CHANNELS, CHANNELS, 3, 3)),
        "conv3": generator.normal(0, 0.2, (CHANNELS, CHANNELS, 3, 3)),
        "logits": generator.normal(0, 1, (CHANNELS, CLASSES)),
    }
    if damage is not None:
        weights[damage][0] *= 3
    initializers = [
        numpy_helper.from_array(value.astype(np.float32), f"{name}.weight") for name, value in weights.items()
    ]
    initializers += [
        numpy_helper.from_array(np.float32(255), "scale"),
        numpy_helper.from_array(np.array([0, CHANNELS], np.int64), "shape"),
    ]

    def conv(name: str, source: str) -> onnx.NodeProto:
        return helper.make_node(
            "Conv", [source, f"{name}.weight"], [name], pads=[1, 1, 1, 1], name=f"node_{name}"
        )

    nodes = [
        helper.make_node("Transpose", ["images"], ["permuted"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["permuted"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["cast", "scale"], ["scaled"]),
        conv("conv1", "scaled"),
        helper.make_node("Relu", ["conv1"], ["relu1"]),
        conv("conv2", "relu1"),
        helper.make_node("Relu", ["conv2"], ["relu2"]),
        conv("conv3", "relu2"),
        helper.make_node("GlobalAveragePool", ["conv3"], ["pool"]),
        helper.make_node("Reshape", ["pool", "shape"], ["flat"]),
        helper.make_node("Gemm", ["flat", "logits.weight"], ["logits"]),
    ]
    for node in nodes:
        node.input[:] = [prefix + name if name not in ("images",) else name for name in node.input]
        node.output[:] = [prefix + name if name != "logits" else name for name in node.output]
    for item in initializers:
        item.name = prefix + item.name
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """(7, 12, 12, 3) uint8: more than one chunk, and not a multiple of it."""
    return np.random.default_rng(1).integers(0, 256, (7, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def graph_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write `build(**arguments)` to a file and return its path."""
    folder = tmp_path_factory.mktemp("graphs")

    def write(**arguments: str) -> Path:
        path = folder / f"{'_'.join(arguments.values()) or 'tiny'}.onnx"
        onnx.save(build(**arguments), str(path))
        return path

    return write


@pytest.fixture(scope="session")
def int8_file(graph_file: Callable[..., Path], images: np.ndarray) -> Path:
    """The tiny graph after ONNX Runtime's static quantization, Q/DQ, per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"images": images}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    source = graph_file()
    path = source.with_name("int8.onnx")
    quantize_static(
        source,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return path
