"""Smaller, faster graphs with the same outputs: onnxslim, then the scale of the pixels into the first convolution."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
from onnx import numpy_helper

from cveff.errors import ExportError
from cveff.measure.onnx_modules import read_modules, write_modules

_INTO_WEIGHTS = ["FusionConvMul", "FusionConvTransposeMul", "FusionGemmMul"]
"""Patterns of onnxslim that take a weight for a constant and fail where it is rounded."""


def simplify(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and drop what has no effect; each node keeps its module. Returns a new graph, `proto` stays.

    Raises:
        ExportError: onnxslim cannot handle the graph.
    """
    import onnxslim

    # onnxslim edits the graph it is given.
    original = onnx.ModelProto()
    original.CopyFrom(proto)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            is_rounded = any(node.op_type == "QuantizeLinear" for node in original.graph.node)
            simplified: onnx.ModelProto = onnxslim.slim(
                original, skip_fusion_patterns=_INTO_WEIGHTS if is_rounded else None
            )
    except Exception as error:
        raise ExportError(f"onnxslim cannot simplify the graph: {type(error).__name__}: {error}") from error
    write_modules(simplified, read_modules(proto))
    return simplified


def fold_scale(proto: onnx.ModelProto) -> bool:
    """Move the multiplication of the pixels into the weights of the convolutions that read them, in place.

    `conv(pad(x * s), w) = conv(pad(x), w * s)` for a scale of one value a channel and zero padding. Nothing
    is changed unless every reader is an ungrouped convolution, padded or not, with constant weights of its own.

    Returns:
        Whether the graph changed.
    """
    graph = proto.graph
    constants = {item.name: item for item in graph.initializer}
    readers = _readers(graph)
    scaling = _scaling(graph, readers)
    if scaling is None or scaling.input[1] not in constants:
        return False
    scale = numpy_helper.to_array(constants[scaling.input[1]]).reshape(-1, _channels(graph))[0]
    convolutions = _convolutions(scaling.output[0], readers, constants)
    if not convolutions:
        return False
    for node in convolutions:
        weight = constants[node.input[1]]
        values = (
            numpy_helper.to_array(weight).astype(np.float64) * scale.astype(np.float64)[None, :, None, None]
        )
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float32), weight.name))
    for reader in readers[scaling.output[0]]:
        for index, name in enumerate(reader.input):
            if name == scaling.output[0]:
                reader.input[index] = scaling.input[0]
    graph.node.remove(scaling)
    graph.initializer.remove(constants[scaling.input[1]])
    return True


def measure_floats(proto: onnx.ModelProto) -> None:
    """Let Shape read the converted pixels, in place: TensorRT's uint8 inputs go to a conversion and nowhere else."""
    graph = proto.graph
    image = graph.input[0].name
    readers = [node for node in graph.node if image in node.input]
    cast = next((node for node in readers if node.op_type == "Cast"), None)
    shapes = [node for node in readers if node.op_type == "Shape"]
    if cast is None or not shapes:
        return
    first = onnx.NodeProto()
    first.CopyFrom(cast)
    graph.node.remove(cast)
    graph.node.insert(0, first)  # it reads the input alone, and Shape may stand before it
    for node in shapes:
        node.input[0] = first.output[0]


def _scaling(graph: onnx.GraphProto, readers: dict[str, list[onnx.NodeProto]]) -> onnx.NodeProto | None:
    """The multiplication in images -> Cast -> Sub -> Mul."""
    name = graph.input[0].name
    for kind in ("Cast", "Sub", "Mul"):
        nodes = readers.get(name, [])
        if len(nodes) != 1 or nodes[0].op_type != kind:
            # A second reader of the input (its batch size, say) is harmless, one of the pixels is not.
            nodes = [node for node in nodes if node.op_type != "Shape"]
            if len(nodes) != 1 or nodes[0].op_type != kind:
                return None
        name = nodes[0].output[0]
    return nodes[0] if len(readers.get(nodes[0].input[1], [])) == 1 else None


def _convolutions(
    name: str, readers: dict[str, list[onnx.NodeProto]], constants: dict[str, onnx.TensorProto]
) -> list[onnx.NodeProto]:
    """Every convolution that reads `name`, through transposes and zero padding; none if anything else reads it."""
    found: list[onnx.NodeProto] = []
    for node in readers.get(name, []):
        if node.op_type == "Transpose" or (node.op_type == "Pad" and _pads_zeros(node, constants)):
            inner = _convolutions(node.output[0], readers, constants)
            if not inner:
                return []
            found += inner
        elif node.op_type == "Conv" and _owns_weight(node, readers, constants):
            found.append(node)
        else:
            return []
    return found


def _owns_weight(
    node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], constants: dict[str, onnx.TensorProto]
) -> bool:
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    weight = constants.get(node.input[1])
    return groups == 1 and weight is not None and len(weight.dims) == 4 and len(readers[node.input[1]]) == 1


def _pads_zeros(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    mode = next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"constant")
    if mode != b"constant":
        return True  # reflected pixels are scaled like the others
    if len(node.input) < 3 or not node.input[2]:
        return True
    value = constants.get(node.input[2])
    return value is not None and not numpy_helper.to_array(value).any()


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for output in graph.output:
        readers.setdefault(output.name, []).append(onnx.NodeProto())
    return readers


def _channels(graph: onnx.GraphProto) -> int:
    return graph.input[0].type.tensor_type.shape.dim[3].dim_value
