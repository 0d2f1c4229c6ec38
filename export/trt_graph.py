"""An ONNX graph as TensorRT's parser meets it: who makes and reads each tensor, its type, where values go."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators with 8-bit kernels that multiply two tensors; their first two inputs are rounded."""
MOVING = {
    "Transpose",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Concat",
    "Pad",
    "MaxPool",
    "Identity",
    "Expand",
    "DepthToSpace",
    "SpaceToDepth",
    "Gather",
    "Tile",
}
"""Operators that commute with rounding: TensorRT moves a pair across them to the operator that uses it."""
RANDOM = {"RandomNormal", "RandomUniform"}
"""Operators that make values from nothing."""
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
EIGHT_BITS = {TensorProto.INT8, TensorProto.FLOAT8E4M3FN}


class TrtGraph:
    """Indices of a graph.

    Attributes:
        nodes: in order.
        constants: initialisers by name.
        maker: the node that writes a tensor; `readers`: those that read it, with the input's place.
        types, shapes: element type and axes of each tensor, as far as inference knows; None for an axis it does not.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes = list(proto.graph.node)
        self.constants = {item.name: item for item in proto.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in self.nodes:
            for place, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, place))
        self.types, self.shapes = self._inferred()

    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return next((item.version for item in self.proto.opset_import if item.domain in ("", "ai.onnx")), 0)

    def value(self, name: str) -> np.ndarray | None:
        """A constant's values, float64 where they are floats of any width; None for what is computed."""
        if name not in self.constants:
            return None
        values = numpy_helper.to_array(self.constants[name])
        return values if values.dtype.kind in "iub" else values.astype(np.float64)

    def is_weight(self, dequantize: onnx.NodeProto) -> bool:
        """Whether a DequantizeLinear's values are constants of the file, rounded already or by a QuantizeLinear."""
        source = dequantize.input[0]
        maker = self.maker.get(source)
        if maker is not None and maker.op_type == "QuantizeLinear":
            source = maker.input[0]
        return source in self.constants

    def uses(self, name: str) -> Iterator[tuple[onnx.NodeProto, int]]:
        """Who reads a tensor in the end, across operators that only move values."""
        for node, place in self.readers.get(name, []):
            if (node.op_type in MOVING and place == 0) or node.op_type == "Concat":
                for output in node.output:
                    yield from self.uses(output)
            else:
                yield node, place

    def source(self, name: str) -> onnx.NodeProto | None:
        """Who made a tensor's values, across operators that only move them."""
        node = self.maker.get(name)
        while node is not None and node.op_type in MOVING:
            node = self.maker.get(node.input[0])
        return node

    def made_by(self, name: str, kind: str) -> onnx.NodeProto | None:
        """The node of this kind that writes a tensor, across moving operators, or None."""
        node = self.source(name)
        return node if node is not None and node.op_type == kind else None

    def depends_on_values(self, name: str) -> bool:
        """Whether a tensor depends on values that the network is given, and not on their shapes alone."""
        seen, ahead = set(), [name]
        while ahead:
            name = ahead.pop()
            if name in seen or not name or name in self.constants:
                continue
            seen.add(name)
            node = self.maker.get(name)
            if node is None or node.op_type in RANDOM:
                return True
            if node.op_type not in ("Shape", "Size"):
                ahead.extend(node.input)
        return False

    def _inferred(self) -> tuple[dict[str, int], dict[str, tuple[int | None, ...]]]:
        bare = onnx.ModelProto()
        bare.CopyFrom(self.proto)
        del bare.graph.value_info[:]  # what the file says of its own tensors is what is to be checked
        try:
            inferred = onnx.shape_inference.infer_shapes(bare).graph
        except onnx.shape_inference.InferenceError:
            inferred = bare.graph  # the checker says that types contradict each other
        known = [
            item
            for group in (inferred.input, inferred.output, inferred.value_info)
            for item in group
            if item.type.HasField("tensor_type")
        ]
        types = {item.name: item.type.tensor_type.elem_type for item in known}
        types |= {name: item.data_type for name, item in self.constants.items()}
        shapes = {
            item.name: tuple(
                axis.dim_value if axis.HasField("dim_value") else None
                for axis in item.type.tensor_type.shape.dim
            )
            for item in known
            if item.type.tensor_type.HasField("shape")
        }
        shapes |= {name: tuple(item.dims) for name, item in self.constants.items()}
        return {name: kind for name, kind in types.items() if kind}, shapes


def label(node: onnx.NodeProto) -> str:
    """A node's name, or what tells it apart where it has none."""
    return node.name or f"{node.op_type} of {node.output[0]}"


def attribute(node: onnx.NodeProto, name: str, default: int = 0) -> int:
    """An integer attribute."""
    return next((item.i for item in node.attribute if item.name == name), default)


def type_name(kind: int) -> str:
    """`float16`, `int8`, …"""
    return str(helper.tensor_dtype_to_string(kind)).rpartition(".")[2].lower()
