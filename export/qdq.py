"""QuantizeLinear and DequantizeLinear in an exported graph: written where the network rounds, then made what engines
fuse.

The exporter writes a pair wherever the module has a `FakeQuantize`. What is left to do on the graph: weights become
integers in the file, a transposition goes before the rounding instead of after it, biases become 32-bit integers
where the engine wants them, and the pixels' scale moves into the first rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import cveff.compress.quant.fake_quant  # noqa: F401  (registers the operator that is translated here)
from cveff.errors import ExportError
from cveff.export.trt_graph import TrtGraph

FLOAT8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)


_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PIXEL_SCALE = "_pixel_scale"
"""Ends the name of a scale that has taken in the pixels'."""


def translations() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`."""
    from onnxscript import opset20 as op

    def quantize_dequantize(x: Any, scale: Any, zero_point: Any, axis: int, low: int, high: int) -> Any:
        kind = TensorProto.INT8 if low < 0 else TensorProto.UINT8
        zero = op.Cast(op.Round(zero_point), to=kind)  # a learned one lies between integers
        if axis < 0:
            return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)
        whole = op.QuantizeLinear(x, scale, zero, axis=axis)
        return op.DequantizeLinear(whole, scale, zero, axis=axis)

    def quantize_dequantize_float8(x: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        zero = op.Cast(zero_point, to=TensorProto.FLOAT8E4M3FN)
        if axis < 0:
            return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero, axis=axis), scale, zero, axis=axis)

    return {
        torch.ops.cveff.quantize_dequantize.default: quantize_dequantize,
        torch.ops.cveff.quantize_dequantize_float8.default: quantize_dequantize_float8,
    }


def has_rounding(proto: onnx.ModelProto) -> bool:
    """Whether some tensor of the graph is rounded."""
    return any(node.op_type == "QuantizeLinear" for node in proto.graph.node)


def finish(proto: onnx.ModelProto, *, integer_biases: bool) -> None:
    """Make the pairs what engines expect, in place.

    Args:
        integer_biases: biases of layers on integers as int32 with the product of the steps (ONNX Runtime, OpenVINO);
            TensorRT wants floats, and one scale on both sides of a pair.

    Raises:
        ExportError: a step is not a constant of the file.
    """
    graph = _Graph(proto)
    graph.fold_zero_points()
    graph.store_weights()
    graph.take_in_types()
    graph.transpose_weights()
    if integer_biases:
        graph.scale_pixels()
        graph.store_biases()
    graph.clean()


class _Graph:
    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto, self.graph = proto, proto.graph
        self.constants = {item.name: item for item in self.graph.initializer}
        self.made_by = {name: node for node in self.graph.node for name in node.output}

    def value(self, name: str) -> np.ndarray:
        if name not in self.constants:
            raise ExportError(f"{name} of a QuantizeLinear is not a constant of the file")
        return numpy_helper.to_array(self.constants[name])

    def add(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.graph.initializer.append(numpy_helper.from_array(np.array(value, order="C"), name))
            self.constants[name] = self.graph.initializer[-1]
        return name

    def fold_zero_points(self) -> None:
        """Casts of constant zero points, unless the simplifier has folded them."""
        for node in list(self.graph.node):
            if node.op_type == "Round" and node.input[0] in self.constants:
                self.add(node.output[0], np.round(self.value(node.input[0])))
                self._remove(node)
                continue
            if node.op_type != "Cast" or node.input[0] not in self.constants:
                continue
            kind = helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
            if kind in (np.int8, np.uint8, FLOAT8):
                self.add(node.output[0], np.round(self.value(node.input[0])).astype(kind))
                self._remove(node)

    def store_weights(self) -> None:
        """QuantizeLinear of a constant: the integers themselves."""
        for node in list(self.graph.node):
            if node.op_type != "QuantizeLinear" or node.input[0] not in self.constants:
                continue
            weight, scale, zero = (self.value(name) for name in node.input)
            shape = [1] * weight.ndim
            if scale.ndim:
                shape[_axis(node)] = -1
            stored = _stored(weight / scale.reshape(shape), zero.reshape(shape))
            if stored.dtype == np.int8 and self._is_weight(node.output[0]):
                # Weights have no lowest integer: their grid reaches equally far to both sides.
                stored = np.maximum(stored, np.int8(-127))
            self.add(node.output[0], stored)
            self._remove(node)

    def _is_weight(self, name: str) -> bool:
        """Whether a layer multiplies by it."""
        for reader in [node for node in self.graph.node if name in node.input]:
            if reader.op_type in _WEIGHTED and list(reader.input).index(name) == 1:
                return True
            is_passed_on = reader.op_type in ("DequantizeLinear", "Transpose", "Reshape")
            if is_passed_on and self._is_weight(reader.output[0]):
                return True
        return False

    def take_in_types(self) -> None:
        """Conversions before and behind a pair: QuantizeLinear reads float16, and DequantizeLinear writes it, where the
        scale is float16."""
        types = TrtGraph(self.proto).types
        for node in list(self.graph.node):
            source = self.made_by.get(node.input[0])
            if source is None or "Cast" not in (node.op_type, source.op_type):
                continue
            if node.op_type == "QuantizeLinear" and types.get(source.input[0]) == TensorProto.FLOAT16:
                node.input[0], node.input[1] = source.input[0], self._in_float16(node.input[1])
            elif _dequantizes(source) and types.get(node.output[0]) == TensorProto.FLOAT16:
                replaced = onnx.NodeProto()
                replaced.CopyFrom(source)
                replaced.name, replaced.input[1] = f"{node.name}_float16", self._in_float16(source.input[1])
                replaced.output[0] = node.output[0]
                self.graph.node.insert(list(self.graph.node).index(node), replaced)
                self.made_by[node.output[0]] = replaced
                self.graph.node.remove(node)

    def _in_float16(self, name: str) -> str:
        scale = self.value(name)
        if not np.array_equal(scale.astype(np.float16).astype(np.float32), scale):
            raise ExportError(f"the scale {name} is no value of float16, in which the network computes there")
        return self.add(f"{name}_float16", scale.astype(np.float16))

    def transpose_weights(self) -> None:
        """Transpose(DequantizeLinear(constant)) -> DequantizeLinear(transposed constant): kernels look for the
        latter."""
        for node in list(self.graph.node):
            source = self.made_by.get(node.input[0]) if node.op_type == "Transpose" else None
            if (
                source is None
                or source.op_type != "DequantizeLinear"
                or source.input[0] not in self.constants
            ):
                continue
            weight = self.value(source.input[0])
            order = (
                list(helper.get_attribute_value(node.attribute[0]))
                if node.attribute
                else list(range(weight.ndim))[::-1]
            )
            name = self.add(f"{source.input[0]}_transposed", weight.transpose(order))
            axis = order.index(_axis(source)) if self.value(source.input[1]).ndim else None
            replaced = helper.make_node(
                "DequantizeLinear",
                [name, *source.input[1:]],
                [node.output[0]],
                name=f"{node.name}_weight",
                **({} if axis is None else {"axis": axis}),
            )
            self.graph.node.insert(list(self.graph.node).index(node), replaced)
            self.made_by[node.output[0]] = replaced
            self.graph.node.remove(node)

    def scale_pixels(self) -> None:
        """`Q(x · c, s) = Q(x, s / c)`: multiplying the pixels by one constant costs nothing."""
        for node in list(self.graph.node):
            if node.op_type != "QuantizeLinear":
                continue
            chain = [node]
            source = self.made_by.get(node.input[0])
            while source is not None and source.op_type == "Transpose":
                chain.append(source)
                source = self.made_by.get(source.input[0])
            if source is None or source.op_type != "Mul" or source.input[1] not in self.constants:
                continue
            if sum(source.output[0] in reader.input for reader in self.graph.node) != 1:
                continue
            factor = np.unique(self.value(source.input[1]))
            if len(factor) != 1 or factor[0] <= 0 or self.value(node.input[1]).ndim:
                continue
            scale = (self.value(node.input[1]).astype(np.float64) / float(factor[0])).astype(np.float32)
            node.input[1] = self.add(f"{node.output[0]}{PIXEL_SCALE}", scale)
            chain[-1].input[0] = source.input[0]
            self._remove(source)

    def store_biases(self) -> None:
        """Float biases of layers whose input and weight are rounded, as DequantizeLinear of int32."""
        for node in list(self.graph.node):
            if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.input) < 3:
                continue
            if node.input[2] not in self.constants:
                continue
            of_input, of_weight = self.made_by.get(node.input[0]), self.made_by.get(node.input[1])
            if not (_dequantizes(of_input) and _dequantizes(of_weight)):
                continue
            assert of_input is not None and of_weight is not None
            scale = self.value(of_input.input[1]).astype(np.float64) * self.value(of_weight.input[1])
            bias = self.value(node.input[2])
            whole = np.round(bias / scale.reshape(-1))
            if np.abs(whole).max(initial=0) > 2**31 - 1:
                continue  # a channel whose step is nearly zero: its bias stays a float
            stem = f"{node.output[0]}_bias"
            pair = helper.make_node(
                "DequantizeLinear",
                [
                    self.add(f"{stem}_integers", whole.astype(np.int32)),
                    self.add(f"{stem}_scale", scale.reshape(-1).astype(np.float32)),
                    self.add(f"{stem}_zero", np.zeros(scale.size, np.int32)),
                ],
                [f"{stem}_dequantized"],
                name=f"{stem}_dequantize",
                axis=0,
            )
            self.graph.node.insert(list(self.graph.node).index(node), pair)
            node.input[2] = f"{stem}_dequantized"

    def clean(self) -> None:
        """Drop nodes and constants that nothing reads."""
        outputs = {item.name for item in self.graph.output}
        while True:
            read = {name for node in self.graph.node for name in node.input} | outputs
            idle = [node for node in self.graph.node if not any(name in read for name in node.output)]
            if not idle:
                break
            for node in idle:
                self.graph.node.remove(node)
        for item in [item for item in self.graph.initializer if item.name not in read]:
            self.graph.initializer.remove(item)

    def _remove(self, node: onnx.NodeProto) -> None:
        for name in node.output:
            self.made_by.pop(name, None)
        self.graph.node.remove(node)


def _stored(ratio: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """A weight in steps, as the type of its zero point."""
    if zero.dtype == FLOAT8:
        return np.clip(ratio, -448, 448).astype(FLOAT8)
    limits = np.iinfo(zero.dtype)
    return np.clip(np.round(ratio) + zero, limits.min, limits.max).astype(zero.dtype)


def _axis(node: onnx.NodeProto) -> int:
    return next((item.i for item in node.attribute if item.name == "axis"), 1)


def _dequantizes(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"
