"""The checker finds nothing in what we write for TensorRT, and each rule in a file that was broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import cveff
from cveff.compress.quant.capture import capture, constant, identify
from cveff.compress.quant.network import QuantizedGraph, insert
from cveff.compress.quant.placement import place
from cveff.compress.quant.ranges import Watch, weight_range
from cveff.compress.samples import samples
from cveff.errors import ExportError
from cveff.export.onnx import export
from cveff.export.trt_check import check_tensorrt, require_tensorrt
from cveff.model import Model, with_module

ZOO = Path(__file__).parents[2] / "model_zoo" / "weights"


def rounded(model: Model) -> Model:
    """By the "tensorrt" scheme, with ranges from digits."""
    data = cveff.data.load("digits")
    assert data.train is not None
    images = [batch for batch, _ in samples(data.train, model.spec.input, 32)]
    graph = capture(model.module, model.spec.input)
    placement = place(graph, "tensorrt")
    roundings = insert(graph, placement)
    watch = Watch(graph, roundings.tensors)
    watch.see(images)
    for name, (low, high) in watch.ranges("minmax").items():
        roundings.tensors[name].set_range(torch.tensor(low), torch.tensor(high))
    nodes = identify(graph)
    for site in placement.weights:
        weight = constant(graph, nodes[site.reader].args[1].args[0])
        roundings.weights[site.reader].set_range(*weight_range(weight, site.axis, site.grid))
    return with_module(model, graph, QuantizedGraph.of(model.spec.input, placement))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """The zoo's residual network for digits, for TensorRT."""
    path = tmp_path_factory.mktemp("trt") / "digits.onnx"
    return onnx.load(export(rounded(cveff.load(ZOO / "digits")), path))


@pytest.fixture
def proto(exported: onnx.ModelProto) -> onnx.ModelProto:
    """A copy to break."""
    copy = onnx.ModelProto()
    copy.CopyFrom(exported)
    return copy


def first(
    proto: onnx.ModelProto, kind: str, which: Callable[[onnx.NodeProto], bool] = lambda _: True
) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == kind and which(node))


def value(proto: onnx.ModelProto, name: str) -> np.ndarray | None:
    return next((numpy_helper.to_array(item) for item in proto.graph.initializer if item.name == name), None)


def add_constant(proto: onnx.ModelProto, name: str, values: np.ndarray) -> str:
    proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def maker(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if name in node.output)


def insert_pair(proto: onnx.ModelProto, reader: onnx.NodeProto, place: int, stem: str = "extra") -> None:
    """Round what `reader` reads once more, by a pair of its own."""
    scale, zero = (
        add_constant(proto, f"{stem}_scale", np.array(0.1, np.float32)),
        add_constant(proto, f"{stem}_zero", np.array(0, np.int8)),
    )
    at = list(proto.graph.node).index(reader)
    pair = [
        helper.make_node(
            "QuantizeLinear", [reader.input[place], scale, zero], [f"{stem}_q"], name=f"{stem}_Q"
        ),
        helper.make_node("DequantizeLinear", [f"{stem}_q", scale, zero], [f"{stem}_dq"], name=f"{stem}_DQ"),
    ]
    reader.input[place] = f"{stem}_dq"
    for offset, node in enumerate(pair):
        proto.graph.node.insert(at + offset, node)


def rules(proto: onnx.ModelProto, version: int = 11) -> dict[str, list[str]]:
    """Rule -> nodes."""
    found: dict[str, list[str]] = {}
    for finding in check_tensorrt(proto, version):
        found.setdefault(finding.rule, []).append(finding.node)
    return found


def test_what_we_export_has_no_findings(exported: onnx.ModelProto) -> None:
    assert check_tensorrt(exported) == []
    assert check_tensorrt(exported, 10) == []
    kinds = [node.op_type for node in exported.graph.node]
    convolutions = kinds.count("Conv")
    assert (
        kinds.count("DequantizeLinear") == kinds.count("QuantizeLinear") + convolutions + 1
    )  # and the classifier
    adds = [node for node in exported.graph.node if node.op_type == "Add"]
    assert adds
    for add in adds:
        sides = sorted(maker(exported, name).op_type for name in add.input)
        assert sides == ["Conv", "DequantizeLinear"]  # one branch alone is rounded


def zero_point(proto: onnx.ModelProto) -> str:
    node = first(proto, "QuantizeLinear")
    node.input[2] = add_constant(proto, "three", np.array(3, np.int8))
    return node.name


def unsigned(proto: onnx.ModelProto) -> str:
    node = first(proto, "QuantizeLinear")
    node.input[2] = add_constant(proto, "unsigned", np.array(0, np.uint8))
    return node.name


def no_zero_point(proto: onnx.ModelProto) -> str:
    node = first(proto, "QuantizeLinear")
    del node.input[2]
    return node.name


def negative_scale(proto: onnx.ModelProto) -> str:
    node = first(proto, "DequantizeLinear")
    node.input[1] = add_constant(proto, "negative", np.array(-1.0, np.float32))
    return node.name


def infinite_scale(proto: onnx.ModelProto) -> str:
    node = first(proto, "QuantizeLinear")
    node.input[1] = add_constant(proto, "infinite", np.array(np.inf, np.float32))
    return node.name


def computed_scale(proto: onnx.ModelProto) -> str:
    node = first(proto, "QuantizeLinear")
    proto.graph.node.insert(0, helper.make_node("Identity", [node.input[1]], ["computed"]))
    node.input[1] = "computed"
    return node.name


def activation_by_channel(proto: onnx.ModelProto) -> str:
    node = first(proto, "QuantizeLinear")
    node.input[1] = add_constant(proto, "several", np.ones(3, np.float32))
    return node.name


def wrong_axis(proto: onnx.ModelProto) -> str:
    def is_square(node: onnx.NodeProto) -> bool:
        weight = value(proto, node.input[0])
        return weight is not None and weight.ndim == 4 and weight.shape[0] == weight.shape[1]

    node = first(proto, "DequantizeLinear", is_square)
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", 1))
    return node.name


def wrong_number_of_scales(proto: onnx.ModelProto) -> str:
    node = first(proto, "DequantizeLinear", lambda node: value(proto, node.input[0]) is not None)
    node.input[1] = add_constant(proto, "too_few", np.ones(2, np.float32))
    return node.name


def integer_bias(proto: onnx.ModelProto) -> str:
    conv = first(proto, "Conv")
    bias = value(proto, conv.input[2])
    assert bias is not None
    whole = add_constant(proto, "whole", np.zeros(bias.shape, np.int32))
    scale = add_constant(proto, "bias_scale", np.ones(bias.shape, np.float32))
    node = helper.make_node("DequantizeLinear", [whole, scale], ["bias"], name="bias_DQ", axis=0)
    proto.graph.node.insert(0, node)
    conv.input[2] = "bias"
    return "bias_DQ"


def rounded_bias(proto: onnx.ModelProto) -> str:
    conv = first(proto, "Conv")
    insert_pair(proto, conv, 2)
    return conv.name


def two_scales(proto: onnx.ModelProto) -> str:
    node = first(proto, "QuantizeLinear")
    node.input[1] = add_constant(proto, "other", np.array(0.5, np.float32))
    return node.name


def no_quantize(proto: onnx.ModelProto) -> str:
    quantize = first(proto, "QuantizeLinear")
    node = first(proto, "DequantizeLinear", lambda node: node.input[0] == quantize.output[0])
    proto.graph.node.remove(quantize)
    proto.graph.input.append(helper.make_tensor_value_info(quantize.output[0], TensorProto.INT8, None))
    return node.name


def no_dequantize(proto: onnx.ModelProto) -> str:
    quantize = first(proto, "QuantizeLinear")
    node = first(proto, "DequantizeLinear", lambda node: node.input[0] == quantize.output[0])
    node.op_type = "Cast"
    del node.input[1:], node.attribute[:]
    node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    return quantize.name


def before_relu(proto: onnx.ModelProto) -> str:
    insert_pair(proto, first(proto, "Relu"), 0)
    return "extra_DQ"


def both_branches(proto: onnx.ModelProto) -> str:
    add = first(proto, "Add")
    place = next(place for place, name in enumerate(add.input) if maker(proto, name).op_type == "Conv")
    insert_pair(proto, add, place)
    return "extra_DQ"


def float_weight(proto: onnx.ModelProto) -> str:
    conv = first(proto, "Conv")
    weight = value(proto, maker(proto, conv.input[1]).input[0])
    assert weight is not None
    conv.input[1] = add_constant(proto, "floats", weight.astype(np.float32))
    return conv.name


def float8_weight(proto: onnx.ModelProto) -> str:
    conv = first(proto, "Conv")
    pair = maker(proto, conv.input[1])
    weight = value(proto, pair.input[0])
    assert weight is not None
    kind = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
    pair.input[0] = add_constant(proto, "eights", weight.astype(kind))
    pair.input[2] = add_constant(proto, "zeros", np.zeros(len(weight), kind))
    return conv.name


def twice(proto: onnx.ModelProto) -> str:
    reader = first(proto, "Conv", lambda node: maker(proto, node.input[0]).op_type == "DequantizeLinear")
    insert_pair(proto, reader, 0)
    return "extra_Q"


def two_pairs(proto: onnx.ModelProto) -> str:
    pair = first(proto, "DequantizeLinear", lambda node: value(proto, node.input[0]) is None)
    reader = next(node for node in proto.graph.node if pair.output[0] in node.input)
    place = list(reader.input).index(pair.output[0])
    reader.input[place] = maker(proto, pair.input[0]).input[0]
    insert_pair(proto, reader, place)
    other = helper.make_node(
        "QuantizeLinear", [maker(proto, "extra_q").input[0], "extra_scale", "extra_zero"], ["again"]
    )
    other.name = "again_Q"
    proto.graph.node.insert(list(proto.graph.node).index(reader), other)
    return "again_Q"


def mixed_floats(proto: onnx.ModelProto) -> str:
    add = first(proto, "Add")
    cast = helper.make_node("Cast", [add.input[0]], ["narrow"], to=TensorProto.FLOAT16)
    proto.graph.node.insert(list(proto.graph.node).index(add), cast)
    add.input[0] = "narrow"
    return add.name


def unknown_domain(proto: onnx.ModelProto) -> str:
    relu = first(proto, "Relu")
    relu.op_type, relu.domain = "QuickGelu", "com.microsoft"
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return relu.name


@pytest.mark.parametrize(
    ("rule", "damage"),
    [
        ("zero-point", zero_point),
        ("zero-point-type", unsigned),
        ("zero-point-type", no_zero_point),
        ("scale", negative_scale),
        ("scale", infinite_scale),
        ("scale", computed_scale),
        ("granularity", activation_by_channel),
        ("weight-axis", wrong_axis),
        ("weight-axis", wrong_number_of_scales),
        ("integer-bias", integer_bias),
        ("integer-bias", rounded_bias),
        ("pair", two_scales),
        ("pair", no_quantize),
        ("pair", no_dequantize),
        ("stranded", before_relu),
        ("stranded", both_branches),
        ("one-sided", float_weight),
        ("one-sided", float8_weight),
        ("double-rounding", twice),
        ("double-rounding", two_pairs),
        ("types", mixed_floats),
        ("opset", unknown_domain),
    ],
)
def test_each_rule_is_found_where_it_is_broken(
    proto: onnx.ModelProto, rule: str, damage: Callable[[onnx.ModelProto], str]
) -> None:
    node = damage(proto)
    found = rules(proto)
    assert node in found[rule], found


@pytest.mark.parametrize(("opset", "version"), [(8, 11), (26, 11), (22, 10)])
def test_opsets_that_a_version_does_not_parse(proto: onnx.ModelProto, opset: int, version: int) -> None:
    proto.opset_import[0].version = opset
    assert "opset" in rules(proto, version)


def test_findings_say_where_what_and_how(proto: onnx.ModelProto) -> None:
    node = zero_point(proto)
    (finding,) = [item for item in check_tensorrt(proto) if item.rule == "zero-point"]
    assert (finding.node, finding.tensor) == (node, "three")
    assert "zero point 3" in str(finding) and "use 0" in str(finding)
    with pytest.raises(ExportError, match=r"not for TensorRT 11: \[zero-point\]"):
        require_tensorrt(proto)


def test_unknown_versions_and_unreadable_files_are_refused(proto: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="version 8 is unknown"):
        check_tensorrt(proto, 8)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no protobuf")
    for path in (broken, tmp_path / "missing.onnx"):
        with pytest.raises(ExportError, match="not a readable ONNX file"):
            check_tensorrt(path)
