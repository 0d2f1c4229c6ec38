"""An ONNX file in bfloat16 for ONNX Runtime's CPU, which lacks kernels: float32's, with results rounded as it says.

For float16 ONNX Runtime does the same by itself.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from cveff.export.trt_graph import TrtGraph

_KEEPS_TYPES = ("Cast", "Identity")


def has_bfloat16(proto: onnx.ModelProto) -> bool:
    """Whether some tensor of the graph is bfloat16."""
    kinds = {item.data_type for item in proto.graph.initializer}
    kinds |= {item.i for node in proto.graph.node if node.op_type == "Cast" for item in node.attribute}
    return TensorProto.BFLOAT16 in kinds


def in_float32(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every operator on bfloat16 is between conversions from and to it.

    What an operator returns is rounded to bfloat16 once, as by kernels that add up in float32; `proto` stays.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    types = TrtGraph(proto).types
    nodes = list(result.graph.node)
    del result.graph.node[:]
    del result.graph.value_info[:]
    widened: set[str] = set()
    for node in nodes:
        if node.op_type not in _KEEPS_TYPES:
            for place, name in enumerate(node.input):
                if types.get(name) != TensorProto.BFLOAT16:
                    continue
                if name not in widened:
                    widened.add(name)
                    result.graph.node.append(
                        helper.make_node("Cast", [name], [f"{name}_float32"], to=TensorProto.FLOAT)
                    )
                node.input[place] = f"{name}_float32"
        after = []
        for place, name in enumerate(node.output):
            if types.get(name) == TensorProto.BFLOAT16 and node.op_type not in _KEEPS_TYPES:
                node.output[place] = f"{name}_exact"
                after.append(helper.make_node("Cast", [f"{name}_exact"], [name], to=TensorProto.BFLOAT16))
        result.graph.node.extend([node, *after])
    return result
