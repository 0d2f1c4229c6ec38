"""Stages of one graph nested in ONNX `If`s: what follows an exit is computed only if some image is not certain
there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cveff.errors import ExportError
from cveff.export.cut import LOGITS, Cut, check


def branching(cut: Cut, thresholds: Sequence[float], gate: str, num_classes: int) -> onnx.ModelProto:
    """One graph: after exit k, `If` every image's certainty reaches its threshold, that exit's logits, else the rest.

    Args:
        cut: of the graph with every exit.
        thresholds: one for each exit but the last; infinite ones are allowed.
        gate: a name in `cveff.runtime.gates.GATES`.

    Raises:
        ExportError: an unknown gate, or the graph is not valid ONNX.
    """
    graph = cut.proto.graph
    constants: list[onnx.TensorProto] = []
    dimension = [graph.input[0].type.tensor_type.shape.dim[0].dim_param, num_classes]

    def output(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dimension)

    known: set[str] = set()

    def body(index: int, result: str) -> list[onnx.NodeProto]:
        nodes = [*cut.shape_nodes(index, known), *cut.nodes[index]]
        known.update(name for node in nodes for name in node.output)
        answer = cut.answers[index]
        if index == len(thresholds):
            return [*nodes, helper.make_node("Identity", [answer], [result])]
        condition, asked = _every_image(answer, thresholds[index], gate, num_classes, index)
        constants.extend(asked[1])
        leave, stay = f"leave{index + 1}", f"stay{index + 1}"
        then = helper.make_graph(
            [helper.make_node("Identity", [answer], [leave])], f"exit{index + 1}", [], [output(leave)]
        )
        other = helper.make_graph(body(index + 1, stay), f"after{index + 1}", [], [output(stay)])
        branch = helper.make_node("If", [condition], [result], then_branch=then, else_branch=other)
        return [*nodes, *asked[0], branch]

    name = f"{LOGITS}:all"
    nodes = [*body(0, name), helper.make_node("Identity", [name], ["answer"])]
    # The last exit is called `logits` inside; the file's answer takes that name over.
    for node in nodes:
        _rename_deep(node, {LOGITS: f"{LOGITS}:last", "answer": LOGITS})
    made = helper.make_graph(
        nodes, graph.name, [graph.input[0]], [output(LOGITS)], [*graph.initializer, *constants]
    )
    model = helper.make_model(
        made, opset_imports=list(cut.proto.opset_import), ir_version=cut.proto.ir_version
    )
    model.producer_name, model.producer_version = cut.proto.producer_name, cut.proto.producer_version
    model.metadata_props.extend(cut.proto.metadata_props)
    check(model)
    return model


def _every_image(
    logits: str, threshold: float, gate: str, num_classes: int, index: int
) -> tuple[str, tuple[list[onnx.NodeProto], list[onnx.TensorProto]]]:
    """A scalar bool: whether the least certain image reaches the threshold; the nodes and constants that compute it."""

    def name(part: str) -> str:
        return f"gate{index + 1}:{part}"

    def constant(part: str, value: np.ndarray) -> str:
        tensors.append(numpy_helper.from_array(value, name(part)))
        return name(part)

    tensors: list[onnx.TensorProto] = []
    nodes = [helper.make_node("Softmax", [logits], [name("p")], axis=-1)]
    axis = constant("axis", np.array([1], np.int64))
    if gate == "confidence" or num_classes == 1:
        nodes.append(helper.make_node("ReduceMax", [name("p"), axis], [name("certainty")], keepdims=0))
    elif gate == "margin":
        two, signs = (
            constant("two", np.array([2], np.int64)),
            constant("signs", np.array([[1], [-1]], np.float32)),
        )
        nodes.append(helper.make_node("TopK", [name("p"), two], [name("best"), name("places")], axis=1))
        nodes.append(helper.make_node("MatMul", [name("best"), signs], [name("certainty")]))
    elif gate == "entropy":
        tiny = constant("tiny", np.array(1e-30, np.float32))
        scale = constant("scale", np.array(1 / math.log(num_classes), np.float32))
        one = constant("one", np.array(1, np.float32))
        nodes += [
            helper.make_node("Max", [name("p"), tiny], [name("positive")]),
            helper.make_node("Log", [name("positive")], [name("log")]),
            helper.make_node("Mul", [name("p"), name("log")], [name("terms")]),
            helper.make_node("ReduceSum", [name("terms"), axis], [name("sum")], keepdims=0),
            helper.make_node("Mul", [name("sum"), scale], [name("share")]),
            helper.make_node("Add", [name("share"), one], [name("certainty")]),
        ]
    else:
        raise ExportError(f"gate {gate!r} is unknown; use confidence, margin or entropy")
    limit = constant("threshold", np.array(threshold, np.float32))
    nodes += [
        helper.make_node("ReduceMin", [name("certainty")], [name("least")], keepdims=0),
        helper.make_node("GreaterOrEqual", [name("least"), limit], [name("leaves")]),
    ]
    return name("leaves"), (nodes, tensors)


def _rename_deep(node: onnx.NodeProto, names: dict[str, str]) -> None:
    for values in (node.input, node.output):
        for index, value in enumerate(values):
            values[index] = names.get(value, value)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                _rename_deep(inner, names)
