"""When a node meets a limit of `trt_limits`: each function returns what is wrong with it, or "" where all is well."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from cveff.export.trt_graph import FLOATS, TrtGraph, attribute, type_name

Condition = Callable[[TrtGraph, onnx.NodeProto], str]

INTEGERS = {TensorProto.INT8, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
KNOWN_TYPES = {
    *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE),
    *(
        TensorProto.FLOAT8E4M3FN,
        TensorProto.FLOAT4E2M1,
        TensorProto.INT4,
        TensorProto.INT8,
        TensorProto.UINT8,
    ),
    *(TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL),
}
_INT32 = np.iinfo(np.int32)


def always(problem: str) -> Condition:
    """For operators that are a problem wherever they are."""
    return lambda graph, node: problem


def computed(*places: int) -> Condition:
    """Inputs that TensorRT wants as constants."""

    def condition(graph: TrtGraph, node: onnx.NodeProto) -> str:
        names = [node.input[place] for place in places if place < len(node.input) and node.input[place]]
        return next((f"{name} is computed" for name in names if name not in graph.constants), "")

    return condition


def more_outputs(than: int) -> Condition:
    """Outputs past the first ones that somebody asks for."""

    def condition(graph: TrtGraph, node: onnx.NodeProto) -> str:
        extra = [name for name in node.output[than:] if name]
        return f"returns {', '.join(extra)} as well" if extra else ""

    return condition


def more_inputs(than: int) -> Condition:
    """Optional inputs past the first ones."""

    def condition(graph: TrtGraph, node: onnx.NodeProto) -> str:
        extra = [name for name in node.input[than:] if name]
        return f"reads {', '.join(extra)} as well" if extra else ""

    return condition


def other(name: str, *fine: object) -> Condition:
    """An attribute with another value than these; leaving it out is fine."""

    def condition(graph: TrtGraph, node: onnx.NodeProto) -> str:
        value = _attribute(node, name)
        return "" if value is None or value in fine else f"{name} is {value}"

    return condition


def given(*names: str) -> Condition:
    """Attributes that are not understood."""
    return lambda graph, node: next((f"has {item.name}" for item in node.attribute if item.name in names), "")


def dilated(graph: TrtGraph, node: onnx.NodeProto) -> str:
    """Dilations other than 1."""
    dilations = _attribute(node, "dilations") or [1]
    return f"dilations are {dilations}" if set(dilations) != {1} else ""


def sized_by_values(*places: int) -> Condition:
    """Inputs that decide a shape and depend on the network's inputs by more than their shapes."""

    def condition(graph: TrtGraph, node: onnx.NodeProto) -> str:
        names = [node.input[place] for place in places if place < len(node.input) and node.input[place]]
        return next(
            (f"{name} is computed from values" for name in names if graph.depends_on_values(name)), ""
        )

    return condition


def of_types(kinds: Collection[int]) -> Condition:
    """A first input of one of these types."""

    def condition(graph: TrtGraph, node: onnx.NodeProto) -> str:
        kind = graph.types.get(node.input[0], 0) if node.input else 0
        return f"reads {type_name(kind)}" if kind in kinds else ""

    return condition


def unknown_types(graph: TrtGraph, node: onnx.NodeProto) -> str:
    """A tensor of a type that TensorRT lacks."""
    names = [*node.input, *node.output]
    kinds = ((name, graph.types.get(name, 0)) for name in names)
    return next(
        (f"{name} is {type_name(kind)}" for name, kind in kinds if kind and kind not in KNOWN_TYPES), ""
    )


def unsigned_inside(graph: TrtGraph, node: onnx.NodeProto) -> str:
    """uint8 anywhere but in a Cast from an input or to an output of the network."""
    if node.op_type in ("Cast", "QuantizeLinear", "DequantizeLinear"):  # rounding has a rule of its own
        inner = [
            name for name in node.input[:1] if name in graph.maker and graph.maker[name].op_type != "Cast"
        ]
        names = inner if node.op_type == "Cast" else []
    else:
        names = [*node.input, *node.output]
    return next((f"{name} is uint8" for name in names if graph.types.get(name) == TensorProto.UINT8), "")


def wide_integers(graph: TrtGraph, node: onnx.NodeProto) -> str:
    """int64 constants past 32 bits; a Slice's mean "to the end"."""
    for name in node.input if node.op_type != "Slice" else ():
        if graph.types.get(name) != TensorProto.INT64:
            continue
        values = graph.value(name)
        if values is not None and values.size and (values.max() > _INT32.max or values.min() < _INT32.min):
            return f"{name} holds {max(int(values.max()), int(values.min()), key=abs)}"
    return ""


def too_many(limit: int) -> Condition:
    """A TopK of this many or more."""

    def condition(graph: TrtGraph, node: onnx.NodeProto) -> str:
        count = graph.value(node.input[1])
        return f"K is {int(count.flat[0])}" if count is not None and count.flat[0] >= limit else ""

    return condition


def not_4d(graph: TrtGraph, node: onnx.NodeProto) -> str:
    """A first input that is known to have another rank than 4."""
    shape = graph.shapes.get(node.input[0])
    return f"{node.input[0]} has {len(shape)} dimensions" if shape is not None and len(shape) != 4 else ""


def uneven_padding(graph: TrtGraph, node: onnx.NodeProto) -> str:
    """Padding that differs between the two ends of an axis."""
    pads = _attribute(node, "pads") or []
    half = len(pads) // 2
    return f"pads are {pads}" if pads[:half] != pads[half:] else ""


def beyond(**largest: int) -> Condition:
    """Attributes, lists of integers, with a value past the largest."""

    def condition(graph: TrtGraph, node: onnx.NodeProto) -> str:
        for name, most in largest.items():
            values = _attribute(node, name) or []
            if values and max(values) > most:
                return f"{name} is {values}"
        return ""

    return condition


def not_2d(graph: TrtGraph, node: onnx.NodeProto) -> str:
    """A kernel over another number of axes than two."""
    kernel = _attribute(node, "kernel_shape") or [0, 0]
    return f"its kernel is {' × '.join(map(str, kernel))}" if len(kernel) != 2 else ""


def grouped_or_padded(graph: TrtGraph, node: onnx.NodeProto) -> str:
    """A transposed convolution in groups, dilated or padded."""
    if attribute(node, "group", 1) != 1:
        return f"group is {attribute(node, 'group')}"
    pads = _attribute(node, "pads") or []
    return dilated(graph, node) or (f"pads are {pads}" if any(pads) else "")


def not_over_channels(graph: TrtGraph, node: onnx.NodeProto) -> str:
    """A concatenation along another axis than the channels'."""
    shape = graph.shapes.get(node.output[0])
    axis = attribute(node, "axis")
    if shape is not None:
        axis %= len(shape)
    return f"axis is {axis}" if axis != 1 else ""


def in_floats(graph: TrtGraph, node: onnx.NodeProto) -> str:
    """float32 or bfloat16 that no DequantizeLinear wrote."""
    kind = graph.types.get(node.input[0], 0)
    is_wide = kind in FLOATS - {TensorProto.FLOAT16}
    return (
        f"computes in {type_name(kind)}"
        if is_wide and not graph.made_by(node.input[0], "DequantizeLinear")
        else ""
    )


def not_among(operators: str) -> Condition:
    """Any other operator."""
    known = set(operators.split())
    return lambda graph, node: "" if node.op_type in known else "DLA does not run it"


def long_axes(most: int) -> Condition:
    """A result with an axis, the batch aside, that is longer."""

    def condition(graph: TrtGraph, node: onnx.NodeProto) -> str:
        shape = graph.shapes.get(node.output[0]) or ()
        longest = max((size for size in shape[1:] if size), default=0)
        return f"an axis of {longest}" if longest > most else ""

    return condition


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    """An attribute's value as Python has it, None where it is not given."""
    found = next((item for item in node.attribute if item.name == name), None)
    if found is None:
        return None
    value = helper.get_attribute_value(found)
    return value.decode() if isinstance(value, bytes) else value
