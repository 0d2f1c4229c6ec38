"""Does a rounded file compute what PyTorch simulates? Layer by layer, each given the simulation's rounded tensors.

Logits alone cannot tell: a value within a float's error of the middle between two steps goes either way, and the layers
behind carry that on, up to the size of the rounding itself. Given the same rounded inputs, a layer's sums differ by a
float's error only, and so all its integers but those few must be equal.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.errors import ExportError
from cveff.export.qdq import PIXEL_SCALE
from cveff.runtime.errors import first_line

FLOAT8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)


@dataclass(frozen=True)
class LayerAgreement:
    """What came of it.

    Attributes:
        compared: roundings.
        equal: share of the rounded values that are the simulation's.
        steps: the most steps (of float8: neighbouring values) that one is off.
        last: max|file - simulation| / max|simulation| of the logits.
    """

    compared: int
    equal: float
    steps: int
    last: float

    @property
    def holds(self) -> bool:
        """One value in a thousand may lie between two steps, and floats may be added up in another order."""
        return self.equal >= 0.999 and self.steps <= 1 and self.last <= 1e-4


def compare_layers(proto: onnx.ModelProto, network: nn.Module, images: np.ndarray) -> LayerAgreement:
    """Run every layer of a rounded file in ONNX Runtime, as written.

    Args:
        proto: its roundings have the network's scales, one a tensor; that of the images may have taken in the pixels'.
        network: the simulation, from uint8 images.
        images: (N, H, W, C) uint8.

    Raises:
        ExportError: the file's roundings are not the network's, or ONNX Runtime cannot run a layer.
    """
    expected, first, logits = _simulate(network, images)
    cut = onnx.ModelProto()
    cut.CopyFrom(proto)
    graph = cut.graph
    constants = {item.name: item for item in graph.initializer}
    given: dict[str, Any] = {graph.input[0].name: images}
    wanted: dict[str, tuple[np.ndarray, float, bool]] = {}
    for node in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        scale = numpy_helper.to_array(constants[node.input[1]])
        if not expected[scale.tobytes()]:
            if not node.input[1].endswith(PIXEL_SCALE) or not expected[first]:
                raise ExportError(
                    f"{node.name} has a scale of {float(scale):.4g}, and no rounding of the network has"
                )
            key, first = first, b""
        else:
            key = scale.tobytes()
        is_float8 = constants[node.input[2]].data_type == TensorProto.FLOAT8E4M3FN
        zero = 0.0 if is_float8 else float(numpy_helper.to_array(constants[node.input[2]]))
        rounded = expected[key].pop(0) - np.float32(zero)
        for reader in [reader for reader in graph.node if node.output[0] in reader.input]:
            given[reader.output[0]] = rounded * numpy_helper.to_array(constants[reader.input[1]])
            graph.input.append(
                helper.make_tensor_value_info(reader.output[0], TensorProto.FLOAT, rounded.shape)
            )
            graph.node.remove(reader)
        # What the file's layer rounded, as floats: ONNX Runtime returns no float8.
        own = f"{node.output[0]}_own"
        wanted[own] = (rounded, float(scale), is_float8)
        graph.node.append(helper.make_node("DequantizeLinear", [node.output[0], *node.input[1:]], [own]))
        graph.output.append(helper.make_tensor_value_info(own, TensorProto.FLOAT, rounded.shape))
    found = _run(cut, [*wanted, proto.graph.output[0].name], given)
    values: list[tuple[np.ndarray, np.ndarray]] = []
    for mine, (rounded, scale, is_float8) in zip(found, wanted.values(), strict=False):
        code = _order if is_float8 else _whole
        values.append((code(mine.astype(np.float64) / scale), code(rounded)))
    total = sum(ours.size for ours, _ in values)
    return LayerAgreement(
        compared=len(values),
        equal=sum(int((ours == theirs).sum()) for ours, theirs in values) / max(total, 1),
        steps=max((int(np.abs(ours - theirs).max()) for ours, theirs in values), default=0),
        last=float(np.abs(found[-1] - logits).max() / max(np.abs(logits).max(), 1e-30)),
    )


def _simulate(
    network: nn.Module, images: np.ndarray
) -> tuple[dict[bytes, list[np.ndarray]], bytes, np.ndarray]:
    """Rounded values of every activation by their scale, in the order they are computed; the first's scale; logits."""
    found: dict[bytes, list[np.ndarray]] = defaultdict(list)

    def remember(part: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        assert isinstance(part, FakeQuantize)
        found[part.scale.numpy().tobytes()].append(part.integers(arguments[0]).numpy())

    activations = [
        part for name, part in network.named_modules()
        if isinstance(part, FakeQuantize) and not name.rpartition(".")[2].startswith("w")
    ]  # fmt: skip
    handles = [part.register_forward_hook(remember) for part in activations]
    try:
        with torch.inference_mode():
            logits = network(torch.from_numpy(images)).numpy()
    finally:
        for handle in handles:
            handle.remove()
    return found, next(iter(found), b""), logits


def _run(proto: onnx.ModelProto, outputs: list[str], inputs: dict[str, Any]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return list(session.run(outputs, inputs))
    except Exception as error:  # ONNX Runtime raises classes of its own, which it does not export
        raise ExportError(f"ONNX Runtime cannot run the file's layers: {first_line(error)}") from error


def _whole(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.int64)


def _order(values: np.ndarray) -> np.ndarray:
    """float8's values, numbered from the most negative to the largest."""
    bits = values.astype(FLOAT8).view(np.uint8).astype(np.int64)
    return np.where(bits & 128, -(bits & 127), bits)
