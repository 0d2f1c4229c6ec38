"""Packed layers in an ONNX file: copied as they are, computed by ONNX Runtime as PyTorch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

import cveff
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
