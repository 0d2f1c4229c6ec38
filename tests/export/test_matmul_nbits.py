"""Packed layers in an ONNX file: copied as they are, computed by ONNX Runtime as PyTorch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import cveff
from cveff.compress.quant.group_rounding import round_nearest
from cveff.compress.quant.packed_linear import PackedLinear, WeightGrid
from cveff.compress.quant.weight_choice import packed_layers
from cveff.compress.quant.weight_only import WeightOnly, quantize_weights
from cveff.errors import ExportError
from cveff.export.matmul_nbits import set_accuracy_level
from cveff.export.normalize import deployable
from cveff.export.onnx import difference
from cveff.model import Model, with_module

VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "embed_dim": 160, "depth": 2, "num_heads": 2}


def quantized(settings: WeightOnly, architecture: str = "vit_tiny_patch16_224", **arguments: Any) -> Model:
    torch.manual_seed(0)
    model = cveff.create(architecture, num_classes=5, **(arguments or VIT))
    model.module.eval()
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return with_module(model, model.module, quantize_weights(model.module, settings).edit)


def run_node(layer: PackedLinear, x: torch.Tensor, level: int) -> torch.Tensor:
    """One `MatMulNBits` made by hand from the layer's buffers."""
    names = ["packed", "scales"] + ([] if layer.zero_points is None else ["zero_points"])
    node = helper.make_node(
        "MatMulNBits",
        ["x", *names],
        ["y"],
        domain="com.microsoft",
        K=layer.in_features,
        N=layer.out_features,
        bits=layer.grid.bits,
        block_size=layer.grid.group_size,
        accuracy_level=level,
    )
    graph = helper.make_graph(
        [node],
        "node",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(getattr(layer, name).numpy(), name) for name in names],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=9)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("inputs", [20, 96, 130, 256])
def test_the_layout_is_onnx_runtimes(inputs: int, group_size: int, bits: int, symmetric: bool) -> None:
    """Short groups, an odd number of them, and both of the engine's ways: one row, and many."""
    torch.manual_seed(0)
    grid = WeightGrid(bits, group_size, symmetric)
    rounded = round_nearest(torch.randn(33, inputs) + 0.3, grid)
    layer = PackedLinear(inputs, 33, grid, bias=False)
    layer.put(rounded.integers, rounded.scales, rounded.zero_points)
    for rows in (1, 3, 70):
        x = torch.randn(rows, inputs)
        for level in (0, 1):
            torch.testing.assert_close(run_node(layer, x, level), layer(x), rtol=1e-5, atol=1e-4)


def nodes(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 32, False), (4, 128, True), (8, 64, False), (8, 32, True)]
)
def test_the_file_holds_the_integers_and_computes_what_pytorch_does(
    tmp_path: Path, bits: int, group_size: int, symmetric: bool
) -> None:
    # 160 inputs: the last group of 64 or 128 is a short one.
    model = quantized(WeightOnly(bits, group_size, symmetric, weights="nearest", min_weights=1))
    path = cveff.export(model, tmp_path / "m.onnx")
    proto = onnx.load(path)
    assert len(nodes(proto)) == 8
    assert difference(path.read_bytes(), deployable(model.module, model.spec.input), model) < 5e-6
    constants = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    stored = {constants[node.input[1]].tobytes() for node in nodes(proto)}
    assert stored == {layer.packed.numpy().tobytes() for _, layer in packed_layers(model.module)}
    # Nothing keeps a float copy of a rounded weight.
    assert (
        max(value.size for value in constants.values() if value.dtype == "float32" and value.ndim == 2)
        < 160 * 160
    )


def test_the_file_is_small(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {**VIT, "embed_dim": 256}
    float_bytes = 4 * cveff.create("vit_tiny_patch16_224", num_classes=5, **arguments).num_parameters
    model = quantized(WeightOnly(weights="nearest"), "vit_tiny_patch16_224", **arguments)
    assert cveff.export(model, tmp_path / "q.onnx", check=False).stat().st_size < 0.2 * float_bytes


def test_a_convnext_exports(tmp_path: Path) -> None:
    model = quantized(
        WeightOnly(group_size=32, weights="nearest", min_weights=1),
        "convnext_tiny",
        image_size=64,
        depths=[1, 1, 1, 1],
        dims=[8, 16, 40, 48],
    )
    path = cveff.export(model, tmp_path / "m.onnx")
    assert len(nodes(onnx.load(path))) == 8


def test_a_saved_model_exports_to_the_same_file(tmp_path: Path) -> None:
    model = quantized(WeightOnly(weights="nearest", min_weights=1))
    cveff.save(model, tmp_path / "m")
    first = cveff.export(model, tmp_path / "a.onnx", check=False)
    second = cveff.export(cveff.load(tmp_path / "m"), tmp_path / "b.onnx", check=False)
    assert first.read_bytes() == second.read_bytes()


def test_accuracy_level_is_said_once_a_node(tmp_path: Path) -> None:
    model = quantized(WeightOnly(group_size=32, weights="nearest", min_weights=1))
    proto = onnx.load(cveff.export(model, tmp_path / "m.onnx", check=False))
    network = deployable(model.module, model.spec.input)
    for level in (1, 4):
        assert set_accuracy_level(proto, level) == 8
        found = [
            attribute.i
            for node in nodes(proto)
            for attribute in node.attribute
            if attribute.name == "accuracy_level"
        ]
        assert found == [level] * 8
        assert difference(proto.SerializeToString(), network, model) < (5e-6 if level == 1 else 0.1)


def test_unknown_levels_and_other_graphs_are_refused() -> None:
    with pytest.raises(ExportError, match="accuracy level 3 is unknown; give one of 0, 1, 4"):
        set_accuracy_level(onnx.ModelProto(), 3)
    with pytest.raises(ExportError, match="no MatMulNBits"):
        set_accuracy_level(onnx.ModelProto(), 4)
