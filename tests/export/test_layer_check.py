"""A file that does not compute what was simulated is caught, by the layer that differs and not by its logits alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import cveff
from cveff.compress.quant.float8 import to_float8
from cveff.compress.quant.network import QuantizedGraph
from cveff.compress.samples import samples
from cveff.errors import ExportError
from cveff.export import onnx as exporter
from cveff.export.layer_check import LayerAgreement, compare_layers
from cveff.export.normalize import deployable
from cveff.export.onnx import example_images, export
from cveff.model import Model, with_module

ZOO = Path(__file__).parents[2] / "model_zoo" / "weights"


@pytest.fixture(scope="module")
def model() -> Model:
    """The digits network in float8."""
    plain = cveff.load(ZOO / "digits")
    data = cveff.data.load("digits")
    assert data.train is not None
    images = [batch for batch, _ in samples(data.train, plain.spec.input, 32)]
    graph, placement = to_float8(plain.module, plain.spec.input, images)
    return with_module(plain, graph, QuantizedGraph.of(plain.spec.input, placement))


@pytest.fixture(scope="module")
def proto(model: Model, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return onnx.load(export(model, tmp_path_factory.mktemp("layers") / "model.onnx"))


def compare(proto: onnx.ModelProto, model: Model) -> LayerAgreement:
    return compare_layers(proto, deployable(model.module, model.spec.input), example_images(4, model))


def changed(proto: onnx.ModelProto, which: int, factor: float) -> onnx.ModelProto:
    """A copy with one convolution's bias multiplied."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    node = [node for node in copy.graph.node if node.op_type == "Conv"][which]
    bias = next(item for item in copy.graph.initializer if item.name == node.input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32(factor), bias.name))
    return copy


def test_what_is_exported_is_what_was_simulated(proto: onnx.ModelProto, model: Model) -> None:
    found = compare(proto, model)
    assert found.holds
    assert found.compared == sum(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    assert found.last < 1e-5


@pytest.mark.parametrize("which", [0, 3])
def test_one_wrong_bias_is_caught(proto: onnx.ModelProto, model: Model, which: int) -> None:
    assert not compare(changed(proto, which, 1.05), model).holds


def test_a_bias_off_by_a_floats_error_is_not(proto: onnx.ModelProto, model: Model) -> None:
    assert compare(changed(proto, 1, 1 + 1e-7), model).holds


def test_roundings_of_another_network_are_refused(proto: onnx.ModelProto, model: Model) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    node = next(node for node in copy.graph.node if node.op_type == "QuantizeLinear")
    scale = next(item for item in copy.graph.initializer if item.name == node.input[1])
    scale.CopyFrom(numpy_helper.from_array(np.array(0.123, np.float32), scale.name))
    with pytest.raises(ExportError, match=r"has a scale of 0\.123, and no rounding of the network has"):
        compare(copy, model)


def test_export_refuses_a_file_that_computes_something_else(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = exporter.finish

    def break_bias(proto: onnx.ModelProto, *, integer_biases: bool) -> None:
        finish(proto, integer_biases=integer_biases)
        proto.CopyFrom(changed(proto, 2, 1.5))

    monkeypatch.setattr(exporter, "finish", break_bias)
    with pytest.raises(ExportError, match="layers are not the simulated ones"):
        export(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_logits_alone_would_not_do(proto: onnx.ModelProto, model: Model) -> None:
    """The last layer's logits are those of its inputs, whatever came before: they were given to it."""
    found = compare(changed(proto, 0, 1.05), model)
    assert found.last < 1e-5 and found.equal < 0.999
    assert torch.is_tensor(next(model.module.parameters()))
