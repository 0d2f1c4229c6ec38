"""Inside ONNX graphs: which tensors are activations, their quantized twins, and running with them exposed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cveff.errors import EngineError, MissingDependencyError
from cveff.measure.onnx_modules import node_module
from cveff.runtime.errors import first_line
from cveff.runtime.onnx_types import harmful_rewrites


@dataclass(frozen=True)
class Quantized:
    """An activation stored as integers: `values ≈ (integers - zero_point) * scale`."""

    tensor: str
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int

    def dequantize(self, integers: np.ndarray) -> np.ndarray:
        """Integers of the tensor's shape -> float32."""
        scale, zero_point = self.scale, self.zero_point
        if scale.ndim:
            shape = [1] * integers.ndim
            shape[self.axis] = -1
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        return ((integers.astype(np.float32) - zero_point.astype(np.float32)) * scale).astype(np.float32)


class Graph:
    """An ONNX file, read for measuring.

    Attributes:
        activations: name -> operator, for every tensor computed from an input at the top level, in order.
        modules: name -> path of the PyTorch module that computed it, where the file says.
        inputs, outputs: names of the graph's inputs and outputs.
        quantized: name of an activation -> its stored integers, where a QuantizeLinear reads it.
        consumers: name -> the nodes that read it.
    """

    def __init__(self, path: str | Path) -> None:
        onnx = _import_onnx()
        self.path = Path(path)
        if not self.path.is_file():
            raise EngineError(f"{path} does not exist; check the path")
        try:
            self.model = onnx.load(str(path))
        except (onnx.checker.ValidationError, OSError, ValueError) as error:
            raise EngineError(f"{path} is not a readable ONNX file: {error}") from error
        except Exception as error:
            if type(error).__name__ != "DecodeError":  # protobuf's, whose class moves between versions
                raise
            raise EngineError(f"{path} is not a readable ONNX file: {error}") from error
        graph = self.model.graph
        constants = {item.name: item for item in graph.initializer}
        self.inputs = tuple(item.name for item in graph.input if item.name not in constants)
        self.outputs = tuple(item.name for item in graph.output)
        self.activations: dict[str, str] = {}
        self.modules: dict[str, str] = {}
        self.consumers: dict[str, list[Any]] = {}
        live = set(self.inputs)
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
            for name in filter(None, node.output):
                if live.intersection(node.input) or any(item.HasField("g") for item in node.attribute):
                    live.add(name)
                    self.activations[name] = node.op_type
                    if module := node_module(node):
                        self.modules[name] = module
            if node.op_type == "Constant":
                constants.update((node.output[0], item.t) for item in node.attribute if item.name == "value")
        self._constants = constants
        self.quantized: dict[str, Quantized] = {}
        self._find_quantized()

    def watchable(self) -> set[str]:
        """Stored integers that can be read while the engine fuses, without stopping it.

        Not those that feed, through a DequantizeLinear, a node whose output is quantized channel by
        channel (as NNCF does before depthwise convolutions): ONNX Runtime would then fuse what it cannot,
        and fail to open.
        """
        producers = {name: node for node in self.model.graph.node for name in node.output}
        refused: set[str] = set()
        for name, twin in self.quantized.items():
            if twin.scale.size > 1 and name in producers:
                sources = [producers.get(item) for item in producers[name].input]
                refused.update(
                    node.input[0]
                    for node in sources
                    if node is not None and node.op_type == "DequantizeLinear"
                )
        return {twin.tensor for twin in self.quantized.values()} - refused

    def constant(self, name: str) -> np.ndarray | None:
        """Value of an initializer or Constant node; None for anything else."""
        if name not in self._constants:
            return None
        return np.asarray(_import_onnx().numpy_helper.to_array(self._constants[name]))

    def _find_quantized(self) -> None:
        for node in self.model.graph.node:
            if node.op_type == "QuantizeLinear" and node.output[0] in self.activations:
                scale = self.constant(node.input[1])
                zero_point = (
                    self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.uint8(0)
                )
                if scale is None or zero_point is None or np.asarray(zero_point).dtype.kind not in "iu":
                    continue  # dynamic or float8 quantization: nothing to restore it with
                axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
                twin = Quantized(node.output[0], scale, np.asarray(zero_point), axis)
                self.quantized.setdefault(node.input[0], twin)


class Exposed:
    """An ONNX Runtime session that also returns chosen intermediate tensors."""

    def __init__(
        self, graph: Graph, tensors: Iterable[str], *, graph_optimizations: bool, threads: int
    ) -> None:
        """
        Args:
            tensors: names to return beside the graph's outputs; those already outputs, or unknown, are
                ignored.
            graph_optimizations: let the engine fuse. An exposed float tensor inside a fusable pattern
                prevents the fusion; exposing the integers behind a QuantizeLinear does not.

        Raises:
            EngineError: ONNX Runtime cannot open the graph.
        """
        onnx, runtime = _import_onnx(), _import_onnxruntime()
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        wanted = [
            name for name in dict.fromkeys(tensors) if name in graph.activations and name not in graph.outputs
        ]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        level = runtime.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if graph_optimizations else level.ORT_DISABLE_ALL
        )
        try:
            self._session = runtime.InferenceSession(
                model.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=harmful_rewrites({item.data_type for item in model.graph.initializer}),
            )
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot open {graph.path}: {first_line(error)}") from error
        types = {item.name: item.type for item in self._session.get_outputs()}
        self._input = graph.inputs[0]
        self._path = graph.path
        self.outputs = graph.outputs
        self.available = tuple(name for name in (*graph.outputs, *wanted) if types[name] in _NUMBERS)

    def run(self, images: np.ndarray, tensors: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Name -> value of `tensors` (by default all available) for uint8 (N, H, W, C) images.

        Raises:
            EngineError: ONNX Runtime failed while running.
        """
        names = list(self.available if tensors is None else tensors)
        if not names:
            return {}  # ONNX Runtime would take no names to mean all of them
        try:
            values = self._session.run(names, {self._input: images})
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed on {self._path}: {first_line(error)}") from error
        return dict(zip(names, values, strict=True))


_NUMBERS = frozenset(
    f"tensor({kind})" for kind in ("float", "float16", "double", "uint8", "int8", "uint16", "int16")
)


def _import_onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise MissingDependencyError("parity between ONNX files needs onnx; pip install onnx") from None
    return onnx


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "parity of ONNX files needs ONNX Runtime; pip install onnxruntime"
        ) from None
    return onnxruntime
