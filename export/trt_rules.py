"""Rules about QuantizeLinear and DequantizeLinear for `trt_check`: each yields node, tensor, problem and hint."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import TensorProto

from cveff.export.trt_graph import EIGHT_BITS, WEIGHTED, TrtGraph, attribute, type_name

Found = Iterator[tuple[onnx.NodeProto, str, str, str]]


def _pairs(graph: TrtGraph) -> list[onnx.NodeProto]:
    return [node for node in graph.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]


def _rounded(graph: TrtGraph) -> list[onnx.NodeProto]:
    return [node for node in graph.nodes if node.op_type == "DequantizeLinear"]


def _eight_bits(node: onnx.NodeProto) -> str:
    """The tensor of a Q or DQ that is not in floats."""
    return str(node.output[0] if node.op_type == "QuantizeLinear" else node.input[0])


def _zero_points(graph: TrtGraph) -> Found:
    for node in _pairs(graph):
        if len(node.input) < 3 or not node.input[2]:
            continue
        zero = graph.value(node.input[2])
        if zero is None:
            yield node, node.input[2], "the zero point is computed", "make it a constant 0"
        elif np.any(zero != 0):
            yield (
                node,
                node.input[2],
                f"zero point {zero.flat[0]:g}",
                "TensorRT is symmetric: use 0 and signed values",
            )


def _zero_types(graph: TrtGraph) -> Found:
    for node in _pairs(graph):
        name = _eight_bits(node)
        kind = graph.types.get(name)
        is_bias = kind == TensorProto.INT32 and node.op_type == "DequantizeLinear"
        if kind is not None and kind not in EIGHT_BITS and not is_bias:
            hint = "give a zero point of type int8 or float8e4m3fn"
            yield node, name, f"rounded to {type_name(kind)}", hint


def _scales(graph: TrtGraph) -> Found:
    for node in _pairs(graph):
        scale = graph.value(node.input[1])
        if scale is None:
            yield node, node.input[1], "the scale is computed", "make it a constant"
        elif not (np.isfinite(scale).all() and (scale > 0).all()):
            bad = scale[~(np.isfinite(scale) & (scale > 0))].flat[0]
            yield node, node.input[1], f"scale {bad:g}", "scales are positive and finite; calibrate again"


def _granularity(graph: TrtGraph) -> Found:
    for node in _pairs(graph):
        scale = graph.value(node.input[1])
        if scale is None or graph.types.get(node.input[0]) == TensorProto.INT32:
            continue
        if attribute(node, "block_size"):
            yield (
                node,
                node.input[0],
                "rounded in blocks",
                "8-bit kernels take one scale a tensor or a channel",
            )
        is_weight = node.input[0] in graph.constants or (
            node.op_type == "DequantizeLinear" and graph.is_weight(node)
        )
        if not is_weight and scale.size > 1:
            yield (
                node,
                node.input[0],
                f"an activation with {scale.size} scales",
                "one scale for the whole tensor",
            )


def _weight_axes(graph: TrtGraph) -> Found:
    for node in _rounded(graph):
        scale = graph.value(node.input[1])
        if scale is None or scale.size < 2 or not graph.is_weight(node) or _is_integer_bias(graph, node):
            continue
        source = graph.maker.get(node.input[0])
        weight = graph.value(source.input[0] if source is not None else node.input[0])
        assert weight is not None
        axis = attribute(node, "axis", 1) % weight.ndim
        if scale.size != weight.shape[axis]:
            yield (
                node, node.input[1], f"{scale.size} scales along axis {axis} of size {weight.shape[axis]}",
                "one scale for each output channel",
            )  # fmt: skip
            continue
        for reader, place in graph.readers.get(node.output[0], []):
            wanted = _channel_axis(reader, place, weight.ndim)
            if wanted is not None and wanted != axis:
                yield (
                    node, node.input[0], f"scales along axis {axis} for a {reader.op_type}",
                    f"its output channels lie on axis {wanted}",
                )  # fmt: skip


def _channel_axis(reader: onnx.NodeProto, place: int, ndim: int) -> int | None:
    """The axis of a weight's output channels."""
    if place > 1:
        return None
    if reader.op_type == "Conv":
        return 0
    if reader.op_type == "ConvTranspose":
        return 1
    if reader.op_type == "Gemm":
        transposed = attribute(reader, "transB" if place == 1 else "transA")
        return int(transposed == 0) if place == 1 else int(transposed == 1)
    if reader.op_type == "MatMul":
        return ndim - 1 if place == 1 else ndim - 2
    return None


def _is_integer_bias(graph: TrtGraph, node: onnx.NodeProto) -> bool:
    return graph.types.get(node.input[0]) == TensorProto.INT32


def _biases(graph: TrtGraph) -> Found:
    hint = "TensorRT takes biases as floats; write them without DequantizeLinear"
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and _is_integer_bias(graph, node):
            yield node, node.input[0], "32-bit integers", hint
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) > 2:
            maker = graph.maker.get(node.input[2])
            if (
                maker is not None
                and maker.op_type == "DequantizeLinear"
                and not _is_integer_bias(graph, maker)
            ):
                yield node, node.input[2], "its bias is rounded", hint


def _partners(graph: TrtGraph) -> Found:
    for node in _pairs(graph):
        if node.op_type == "QuantizeLinear":
            readers = list(graph.uses(node.output[0]))
            if not readers or any(reader.op_type != "DequantizeLinear" for reader, _ in readers):
                yield node, node.output[0], "not read by a DequantizeLinear alone", "write Q and DQ as a pair"
            for reader, _ in readers:
                if reader.op_type == "DequantizeLinear" and not _same_steps(graph, node, reader):
                    yield (
                        node,
                        node.input[1],
                        "another scale than its DequantizeLinear's",
                        "give both one scale",
                    )
            continue
        is_constant = graph.is_weight(node) or _is_integer_bias(graph, node)
        if not is_constant and graph.made_by(node.input[0], "QuantizeLinear") is None:
            yield node, node.input[0], "not written by a QuantizeLinear", "write Q and DQ as a pair"


def _same_steps(graph: TrtGraph, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    first, second = graph.value(one.input[1]), graph.value(other.input[1])
    return first is None or second is None or np.array_equal(first, second)


def _stranded(graph: TrtGraph) -> Found:
    for node in _rounded(graph):
        if _is_integer_bias(graph, node):
            continue
        is_weight = graph.is_weight(node)
        uses = list(graph.uses(node.output[0]))
        if not any(_fuses(graph, reader, place, node, is_weight) for reader, place in uses):
            kinds = ", ".join(sorted({reader.op_type for reader, _ in uses})) or "nothing"
            yield (
                node, node.output[0], f"read by {kinds}, which no 8-bit kernel fuses with it",
                "round only inputs of Conv, ConvTranspose, Gemm, MatMul and the skip of an Add behind a Conv",
            )  # fmt: skip


def _fuses(
    graph: TrtGraph, reader: onnx.NodeProto, place: int, pair: onnx.NodeProto, is_weight: bool
) -> bool:
    if reader.op_type in WEIGHTED:
        return place < 2
    if reader.op_type != "Add" or is_weight:
        return False
    branch = graph.maker.get(reader.input[1 - place])
    return (
        branch is not None
        and branch.op_type in ("Conv", "ConvTranspose")
        and _is_rounded(graph, branch)
        and len(graph.readers.get(branch.output[0], [])) == 1
    )


def _is_rounded(graph: TrtGraph, node: onnx.NodeProto) -> bool:
    return all(graph.made_by(name, "DequantizeLinear") is not None for name in node.input[:2])


def _one_sided(graph: TrtGraph) -> Found:
    for node in graph.nodes:
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            continue
        pairs = [graph.made_by(name, "DequantizeLinear") for name in node.input[:2]]
        if any(pairs) and not all(pairs):
            name = node.input[pairs.index(None)]
            yield node, name, "is in floats while the other input is rounded", "round both, or neither"
        kinds = {graph.types.get(pair.input[0], 0) for pair in pairs if pair is not None} - {0}
        if len(kinds) > 1:
            names = " and ".join(sorted(map(type_name, kinds)))
            yield node, node.input[1], f"inputs rounded to {names}", "round both to one type"


def _twice(graph: TrtGraph) -> Found:
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear":
            continue
        before = graph.made_by(node.input[0], "DequantizeLinear")
        if before is not None:
            yield (
                node,
                node.input[0],
                f"rounded already by {before.name or before.output[0]}",
                "round it once",
            )
        twins = [reader for reader, _ in graph.readers[node.input[0]] if reader.op_type == "QuantizeLinear"]
        if node is not twins[0]:
            yield (
                node,
                node.input[0],
                f"rounded by {len(twins)} QuantizeLinear",
                "let all readers share one pair",
            )


RULES: dict[str, Callable[[TrtGraph], Found]] = {
    "zero-point": _zero_points,
    "zero-point-type": _zero_types,
    "scale": _scales,
    "granularity": _granularity,
    "weight-axis": _weight_axes,
    "integer-bias": _biases,
    "pair": _partners,
    "stranded": _stranded,
    "one-sided": _one_sided,
    "double-rounding": _twice,
}
"""Every rule about rounding, by name."""
