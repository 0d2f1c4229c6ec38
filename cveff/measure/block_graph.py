"""A `Block` as a tiny ONNX model of its own: float inputs, random weights."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cveff.errors import CveffError
from cveff.measure.block import Block

OPSET = 20

UNARY = {
    "relu": "Relu",
    "relu6": "Clip",
    "silu": "Sigmoid",
    "gelu": "Gelu",
    "hardswish": "HardSwish",
    "hardsigmoid": "HardSigmoid",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "leaky_relu": "LeakyRelu",
    "elu": "Elu",
    "softplus": "Softplus",
    "exp": "Exp",
    "sqrt": "Sqrt",
    "pow": "Pow",
    "erf": "Erf",
    "sin": "Sin",
    "cos": "Cos",
    "neg": "Neg",
    "abs": "Abs",
}
"""Activations and elementwise functions of one value: cveff's name -> ONNX operator."""
BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}


def block_model(block: Block) -> onnx.ModelProto:
    """The model: inputs `x0`, `x1`, … of `block.inputs`' shapes, one output.

    Raises:
        CveffError: the block's kind or operator is none of those `Block` lists.
    """
    graph = _Graph()
    names = [f"x{index}" for index in range(len(block.inputs))]
    builder = _BUILDERS.get(block.kind)
    if builder is None:
        raise CveffError(f"block kind {block.kind!r} is unknown; known: {', '.join(_BUILDERS)}")
    value = builder(graph, block, names)
    if block.activation:
        value = graph.unary(block.activation, value)
    dtype = TensorProto.UINT8 if block.kind == "input" else TensorProto.FLOAT
    proto = helper.make_graph(
        graph.nodes,
        "block",
        [
            helper.make_tensor_value_info(name, dtype, shape)
            for name, shape in zip(names, block.inputs, strict=True)
        ],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)],
        graph.constants,
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


class _Graph:
    """Nodes and constants as they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def add(self, op: str, inputs: list[str], **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, shape: tuple[int, ...]) -> str:
        """Random values of the usual size: none is so small that its products underflow, which is slow."""
        fan_in = max(1, int(np.prod(shape[1:])))
        return self.constant(self._random.normal(0, fan_in**-0.5, shape).astype(np.float32))

    def positive(self, size: int) -> str:
        return self.constant(self._random.uniform(0.5, 1.5, size).astype(np.float32))

    def unary(self, name: str, value: str) -> str:
        if name not in UNARY:
            raise CveffError(f"activation {name!r} is unknown; known: {', '.join(UNARY)}")
        if name == "silu":  # as exporters write it at this operator set
            return self.add("Mul", [value, self.add("Sigmoid", [value])])
        extra = {
            "relu6": [np.float32(0), np.float32(6)],
            "pow": [np.float32(2)],
        }.get(name, [])
        slope: dict[str, object] = {"alpha": 1 / 6, "beta": 0.5} if name == "hardsigmoid" else {}
        return self.add(UNARY[name], [value, *(self.constant(np.asarray(item)) for item in extra)], **slope)


def _conv(graph: _Graph, block: Block, names: list[str]) -> str:
    pads = block.padding or (0, 0)
    value = graph.add(
        "Conv",
        [names[0], graph.weight(block.weight), graph.weight((block.weight[0],))],
        strides=list(block.stride or (1, 1)),
        pads=[*pads, *pads],
        dilations=list(block.dilation or (1, 1)),
        group=block.groups,
        kernel_shape=list(block.weight[2:]),
    )
    return _residual(graph, names, value)


def _linear(graph: _Graph, block: Block, names: list[str]) -> str:
    out_features, in_features = block.weight
    weight = graph.weight((in_features, out_features))
    bias = graph.weight((out_features,))
    if len(block.inputs[0]) == 2:
        return _residual(graph, names, graph.add("Gemm", [names[0], weight, bias]))
    return _residual(graph, names, graph.add("Add", [graph.add("MatMul", [names[0], weight]), bias]))


def _residual(graph: _Graph, names: list[str], value: str) -> str:
    return graph.add("Add", [value, names[1]]) if len(names) > 1 else value


def _matmul(graph: _Graph, block: Block, names: list[str]) -> str:
    other = names[1] if len(names) > 1 else graph.weight(block.weight)
    return graph.add("MatMul", [names[0], other])


def _norm(graph: _Graph, block: Block, names: list[str]) -> str:
    channels = block.inputs[0][block.channel_dim]
    if block.op == "batch":
        statistics = [graph.positive(channels) for _ in range(4)]
        return graph.add("BatchNormalization", [names[0], *statistics])
    if block.op == "layer":
        return graph.add(
            "LayerNormalization", [names[0], graph.positive(channels), graph.positive(channels)], axis=-1
        )
    if block.op == "group":
        # As exporters write it: an instance norm over groups, then each channel's scale and offset.
        batch, size = block.inputs[0][0], int(np.prod(block.inputs[0][2:], dtype=np.int64))
        apart = graph.constant(np.array([batch, block.groups, channels // block.groups * size], np.int64))
        back = graph.constant(np.array(block.inputs[0], np.int64))
        ones, zeros = graph.positive(block.groups), graph.positive(block.groups)
        value = graph.add("InstanceNormalization", [graph.add("Reshape", [names[0], apart]), ones, zeros])
        shape = (channels, *(1 for _ in block.inputs[0][2:]))
        scaled = graph.add("Mul", [graph.add("Reshape", [value, back]), graph.weight(shape)])
        return graph.add("Add", [scaled, graph.weight(shape)])
    raise CveffError(f"norm {block.op!r} is unknown; known: batch, layer, group")


def _elementwise(graph: _Graph, block: Block, names: list[str]) -> str:
    if block.op not in BINARY:
        return graph.unary(block.op, names[0])
    other = names[1] if len(names) > 1 else graph.weight(block.weight)
    return graph.add(BINARY[block.op], [names[0], other])


def _pool(graph: _Graph, block: Block, names: list[str]) -> str:
    if block.op == "mean":
        axes = {4: [2, 3], 3: [1]}.get(len(block.inputs[0]), [-1])
        if len(block.inputs[0]) == 4 and block.channel_dim == 3:
            axes = [1, 2]
        return graph.add("ReduceMean", [names[0], graph.constant(np.array(axes, np.int64))], keepdims=1)
    pads = block.padding or (0, 0)
    return graph.add(
        {"max": "MaxPool", "average": "AveragePool"}[block.op],
        names,
        kernel_shape=list(block.weight),
        strides=list(block.stride or block.weight),
        pads=[*pads, *pads],
    )


def _softmax(graph: _Graph, block: Block, names: list[str]) -> str:
    return graph.add("Softmax", names, axis=-1)


def _move(graph: _Graph, block: Block, names: list[str]) -> str:
    op, _, order = block.op.partition(":")
    if op == "transpose":
        return graph.add("Transpose", names, perm=[int(item) for item in order.split(",")])
    if op == "resize":
        scales = graph.constant(np.array([1, 1, 2, 2], np.float32))
        return graph.add("Resize", [names[0], "", scales], mode="nearest")
    # Joined with one more channel: engines drop copies that change nothing.
    one = tuple(1 if dim == block.channel_dim else size for dim, size in enumerate(block.inputs[0]))
    return graph.add("Concat", [names[0], graph.weight(one)], axis=block.channel_dim)


def _reorder(graph: _Graph, block: Block, names: list[str]) -> str:
    return graph.add("MaxPool", names, kernel_shape=[1, 1])


def _input(graph: _Graph, block: Block, names: list[str]) -> str:
    planes = graph.add("Transpose", [graph.add("Cast", names, to=TensorProto.FLOAT)], perm=[0, 3, 1, 2])
    return graph.add("Sub", [planes, graph.weight((block.inputs[0][3], 1, 1))])


_BUILDERS = {
    "conv": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "norm": _norm,
    "elementwise": _elementwise,
    "pool": _pool,
    "softmax": _softmax,
    "move": _move,
    "reorder": _reorder,
    "input": _input,
}
