"""Laws of ONNX Runtime's int8 files: what is rounded and what is not, and every calibration that is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import cveff
from cveff.errors import ExportError
from cveff.export.calibration import BATCH, batches
from cveff.export.graph import (
    has_attention,
    has_layer_norms,
    has_signed_activations,
    preprocessing_nodes,
    read_onnx,
)
from cveff.export.metadata import read_metadata
from cveff.export.onnx import example_images, export
from cveff.export.quantize import quantize_onnx
from cveff.runtime.engines import open_file


@pytest.fixture(scope="module", params=["small_resnet_s", "test_vit"])
def source(request, tmp_path_factory) -> tuple[Path, np.ndarray, np.ndarray]:
    """An exported file, calibration images and held-out images."""
    torch.manual_seed(0)
    if request.param == "small_resnet_s":
        model = cveff.create("small_resnet_s", num_classes=10, channels=1, image_size=28)
    else:
        model = cveff.create("test_vit", num_classes=10, image_size=64)
    for module in model.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = export(model, tmp_path_factory.mktemp("source") / "model.onnx", check=False)
    return path, example_images(10, model, seed=1), example_images(16, model, seed=2)


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory) -> Path:
    return quantize_onnx(source[0], tmp_path_factory.mktemp("int8") / "model.onnx", source[1])


def _logits(path: Path, images: np.ndarray) -> np.ndarray:
    with open_file("onnxruntime", path, threads=1) as session:
        return session(images)


def _error(path: Path, source: tuple[Path, np.ndarray, np.ndarray]) -> float:
    """Size of the error over size of the logits' variation, on held-out images."""
    expected, found = _logits(source[0], source[2]), _logits(path, source[2])
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean(0)))


def _constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}


def test_int8_stays_close_and_shrinks(source, quantized):
    assert _error(quantized, source) < 0.3  # random weights: logits hardly vary, so errors weigh more
    assert quantized.stat().st_size < 0.6 * source[0].stat().st_size


def test_at_least_as_close_as_the_tools_own_defaults(source, quantized, tmp_path):
    """The peer's call, as its documentation has it for x86, on the same file and images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(source[1])

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {"images": image[None]}

    quant_pre_process(source[0], tmp_path / "prepared.onnx")
    quantize_static(
        tmp_path / "prepared.onnx",
        tmp_path / "peer.onnx",
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
    )
    assert _error(quantized, source) <= 1.05 * _error(tmp_path / "peer.onnx", source)


def test_same_calibration_gives_the_same_bytes(source, quantized, tmp_path):
    assert quantize_onnx(source[0], tmp_path / "again.onnx", source[1]).read_bytes() == quantized.read_bytes()


def test_metadata_survives(source, quantized):
    assert read_metadata(onnx.load(quantized)) == read_metadata(onnx.load(source[0]))


def test_pixels_are_rounded_once(quantized):
    """images -> Cast -> Sub -> (Mul ->) Transpose stays in float32; the first rounding follows."""
    graph = onnx.load(quantized).graph
    names = set(preprocessing_nodes(onnx.load(quantized)))
    makers = {name: node for node in graph.node for name in node.output}
    inside = [node for node in graph.node if node.name in names]
    assert [node.op_type for node in inside][:2] == ["Cast", "Sub"]
    for node in inside:
        assert all(makers[name].name in names for name in node.input if name in makers)


def test_weights_have_a_scale_a_channel_and_fill_their_bits(quantized):
    proto = onnx.load(quantized)
    constants = _constants(proto)
    weights = [
        (constants[node.input[0]], constants[node.input[1]])
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and constants.get(node.input[0], np.zeros(0)).dtype == np.int8
    ]
    assert weights
    for values, scale in weights:
        assert scale.ndim == 1
        assert len(scale) in values.shape
        assert np.abs(values.astype(int)).max() == 127


def test_matrix_products_return_floats(quantized):
    graph = onnx.load(quantized).graph
    rounded = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    bare = [node for node in graph.node if node.op_type == "Gemm"]
    assert bare
    assert all(node.output[0] not in rounded for node in bare)


def test_attention_and_norms_stay_in_float(source, quantized):
    if not has_attention(onnx.load(source[0])):
        pytest.skip("a convolutional network")
    graph = onnx.load(quantized).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type in ("Add", "Softmax", "LayerNormalization", "Gelu", "Mul"):
            assert not dequantized.intersection(node.input)


def test_settings_do_what_they_say(source, tmp_path):
    path, images, _ = source
    signed = quantize_onnx(path, tmp_path / "a.onnx", images, activations="int8", per_channel=False)
    proto = onnx.load(signed)
    constants = _constants(proto)
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constants[node.input[2]].dtype == np.int8
            assert not constants[node.input[2]].any()
        if node.op_type == "DequantizeLinear" and constants.get(node.input[0], np.zeros(0)).dtype == np.int8:
            assert constants[node.input[1]].size == 1
    narrow = quantize_onnx(path, tmp_path / "b.onnx", images, reduce_range=True)
    weights = [
        values
        for values in _constants(onnx.load(narrow)).values()
        if values.dtype == np.int8 and values.ndim > 1
    ]
    assert max(np.abs(values.astype(int)).max() for values in weights) <= 64


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_other_calibration_methods_stay_close(source, tmp_path, method):
    assert _error(quantize_onnx(source[0], tmp_path / "model.onnx", source[1], method=method), source) < 0.4


def test_excluded_nodes_stay_in_float(source, tmp_path):
    path, images, _ = source
    first = next(node for node in onnx.load(path).graph.node if node.op_type == "Conv")
    proto = onnx.load(quantize_onnx(path, tmp_path / "model.onnx", images, exclude=[first.name]))
    assert _constants(proto)[first.input[1]].dtype == np.float32


def test_batches_are_small_and_lose_nothing():
    images = np.arange(11 * 4, dtype=np.uint8).reshape(11, 2, 2, 1)
    parts = list(batches(images))
    assert np.array_equal(np.concatenate(parts), images)
    assert max(len(part) for part in parts) == BATCH


def test_kinds_of_networks_are_told_apart(source):
    proto = onnx.load(source[0])
    is_transformer = b"test_vit" in source[0].read_bytes()
    assert has_attention(proto) is has_layer_norms(proto) is has_signed_activations(proto) is is_transformer


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, 28, 28, 1), np.uint8), "no calibration images"),
        (np.zeros((2, 28, 28, 1), np.float32), "float32"),
        (np.zeros((28, 28, 1), np.uint8), r"\(28, 28, 1\)"),
        (np.zeros((2, 32, 28, 1), np.uint8), "32×28×1.*28×28×1"),
        (np.zeros((2, 1, 28, 28), np.uint8), "1×28×28.*28×28×1"),
        (np.zeros((2, 28, 28, 3), np.uint8), "28×28×3"),
        ([[1, 2]], "list"),
    ],
)
def test_unusable_calibration_is_refused(images, message, convolutional, tmp_path):
    with pytest.raises(ExportError, match=message):
        quantize_onnx(convolutional, tmp_path / "out.onnx", images)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "'magic'.*minmax"),
        ({"activations": "int4"}, "'int4'.*uint8"),
        ({"exclude": ["nobody"]}, "nobody"),
        ({"op_types": ["Softmax"]}, "Softmax"),
    ],
)
def test_unknown_settings_are_refused(settings, message, convolutional, tmp_path):
    with pytest.raises(ExportError, match=message):
        quantize_onnx(convolutional, tmp_path / "out.onnx", np.zeros((1, 28, 28, 1), np.uint8), **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_quantizer_is_named_and_spares_the_destination(convolutional, tmp_path, monkeypatch):
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    def fails(self):
        raise KeyError("scale of tensor x")

    (tmp_path / "out.onnx").write_text("older")
    monkeypatch.setattr(QDQQuantizer, "quantize_model", fails)
    with pytest.raises(ExportError, match=r"ONNX Runtime: KeyError.*scale of tensor x"):
        quantize_onnx(convolutional, tmp_path / "out.onnx", np.zeros((1, 28, 28, 1), np.uint8))
    assert (tmp_path / "out.onnx").read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 1


def test_quantizing_is_silent(convolutional, tmp_path, capfd):
    quantize_onnx(convolutional, tmp_path / "out.onnx", np.zeros((1, 28, 28, 1), np.uint8))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_files_that_are_not_exports_are_refused(tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        read_onnx(tmp_path / "absent.onnx")
    for name, data in (("text.onnx", b"hello, world"), ("empty.onnx", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ExportError, match="ONNX file"):
            read_onnx(tmp_path / name)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([("x", TensorProto.FLOAT, ["N", 3, 8, 8])], "uint8"),
        ([("x", TensorProto.UINT8, ["N", 8, 8, 3]), ("y", TensorProto.UINT8, ["N", 8, 8, 3])], "one batch"),
        ([("x", TensorProto.UINT8, ["N", "H", "W", 3])], "fixed size"),
    ],
)
def test_graphs_with_other_inputs_are_refused(inputs, message, tmp_path):
    values = [helper.make_tensor_value_info(*item) for item in inputs]
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    nodes = [helper.make_node("Cast", ["x"], ["z"], to=TensorProto.FLOAT)]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values, [output])), path)
    with pytest.raises(ExportError, match=message):
        read_onnx(path)


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory) -> Path:
    """A small file made without torch, for tests of what is refused."""
    rng = np.random.default_rng(0)
    constants = {
        "offset": np.full((1, 1, 28, 1), 127.5, np.float32),
        "kernel": rng.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "head": rng.normal(size=(4, 5)).astype(np.float32),
        "bias": rng.normal(size=5).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["a"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Sub", ["a", "offset"], ["b"], "shift"),
        helper.make_node("Transpose", ["b"], ["c"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["c", "kernel"], ["d"], "convolution"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], "pool"),
        helper.make_node("Flatten", ["e"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "head", "bias"], ["logits"], "classifier"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 28, 28, 1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5])
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [images], [logits], initializers)
    path = tmp_path_factory.mktemp("plain") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
