"""Reading an exported ONNX graph: the file, its input, and what kind of network it is."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

from cveff.errors import ExportError
from cveff.runtime.errors import first_line


def read_onnx(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX file with one image input.

    Raises:
        ExportError: it does not exist, is damaged, or does not take uint8 (N, H, W, C) images.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path} does not exist; export the model first")
    try:
        proto = onnx.load(path)
    except (DecodeError, OSError, onnx.checker.ValidationError) as error:
        raise ExportError(
            f"{path} is not a readable ONNX file ({first_line(error)}); export the model again"
        ) from error
    if not proto.graph.node:
        raise ExportError(f"{path} is not an ONNX file, or an empty one; export the model again")
    image_shape(proto, path)
    return proto


def image_shape(proto: onnx.ModelProto, path: str | Path = "the graph") -> tuple[int, int, int]:
    """(height, width, channels) of the input.

    Raises:
        ExportError: the graph has several inputs, or not one of uint8 NHWC images of a fixed size.
    """
    inputs = proto.graph.input
    tensor = inputs[0].type.tensor_type if len(inputs) == 1 else None
    if tensor is None or tensor.elem_type != onnx.TensorProto.UINT8 or len(tensor.shape.dim) != 4:
        raise ExportError(
            f"{path} does not take one batch of uint8 (N, H, W, C) images; use a file written by `export`"
        )
    height, width, channels = (dim.dim_value for dim in tensor.shape.dim[1:])
    if min(height, width, channels) < 1:
        raise ExportError(f"{path} takes images of no fixed size; use a file written by `export`")
    return height, width, channels


def preprocessing_nodes(proto: onnx.ModelProto) -> list[str]:
    """Names of the nodes from the input to the first one that is not normalisation (Cast, Sub, Mul, Transpose)."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    name, names = proto.graph.input[0].name, []
    for kind in ("Cast", "Sub", "Mul", "Transpose"):
        found = [node for node in readers.get(name, []) if node.op_type == kind]
        if found:
            names.append(found[0].name)
            name = found[0].output[0]
    return names


def has_attention(proto: onnx.ModelProto) -> bool:
    """Whether the graph is a transformer: layer norms, and a softmax between matrix products."""
    return "Softmax" in kinds(proto) and has_layer_norms(proto)


def has_layer_norms(proto: onnx.ModelProto) -> bool:
    """Whether the graph normalises with layer norms (transformers, ConvNeXt, mixers)."""
    return "LayerNormalization" in kinds(proto)


def has_signed_activations(proto: onnx.ModelProto) -> bool:
    """Whether an activation function has a negative side, so that its range is lopsided around zero."""
    return bool(
        kinds(proto) & {"HardSwish", "Gelu", "Erf", "Elu", "Mish", "Swish", "LeakyRelu", "PRelu", "Sigmoid"}
    )


def kinds(proto: onnx.ModelProto) -> set[str]:
    """The operators that occur in the graph."""
    return {node.op_type for node in proto.graph.node}
