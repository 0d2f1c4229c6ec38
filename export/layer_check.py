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

SMALL = 2.0**-5
"""Of a tensor's largest value: there float8's neighbours are four of float16's steps apart, at the largest."""


@dataclass(frozen=True)
class LayerAgreement:
    """What came of it.

    Attributes:
        compared: roundings.
        equal: share of the rounded values that are the simulation's.
        steps: the most steps (of float8: neighbouring values; in float16 only of those that are not small) that one is
            off.
        last: max|file - simulation| / max|simulation| of the logits.
        in_float16: some scale of the file is float16, and so what is computed behind it.
    """

    compared: int
    equal: float
    steps: int
    last: float
    in_float16: bool = False

    @property
    def holds(self) -> bool:
        """One value in a thousand may lie between two steps, and floats may be added up in another order.

        What is rounded to float16 on the way is up to 1/16 of a step off at the end of a grid of 127 steps, and engines
        do so in different places.
        """
        if self.in_float16:
            return self.equal >= 0.95 and self.steps <= 1 and self.last <= 1e-2
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
        scale = numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
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
            kind, name = constants[reader.input[1]].data_type, f"{reader.output[0]}_given"
            given[name] = rounded * numpy_helper.to_array(constants[reader.input[1]]).astype(np.float32)
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, rounded.shape))
            graph.node.insert(0, helper.make_node("Cast", [name], [reader.output[0]], to=kind))
            graph.node.remove(reader)
        # What the file's layer rounded, as floats: ONNX Runtime returns no float8.
        own = f"{node.output[0]}_own"
        wanted[own] = (rounded, float(scale), is_float8)
        step = f"{own}_scale"
        graph.initializer.append(numpy_helper.from_array(scale, step))
        graph.node.append(helper.make_node("DequantizeLinear", [node.output[0], step, node.input[2]], [own]))
        graph.output.append(helper.make_tensor_value_info(own, TensorProto.FLOAT, rounded.shape))
    found = _run(cut, [*wanted, proto.graph.output[0].name], given)
    in_float16 = any(item.data_type == TensorProto.FLOAT16 for item in constants.values())
    equal = total = steps = 0
    for mine, (rounded, scale, is_float8) in zip(found, wanted.values(), strict=False):
        code = _order if is_float8 else _whole
        in_steps = mine.astype(np.float64) / scale
        off = np.abs(code(in_steps) - code(rounded))
        equal, total = equal + int((off == 0).sum()), total + off.size
        if is_float8 and in_float16:
            # float8 is finest around zero, far finer there than a float16 sum of larger values.
            sizes = np.maximum(np.abs(in_steps), np.abs(rounded))
            off = off[sizes >= SMALL * sizes.max(initial=0)]
        steps = max(steps, int(off.max(initial=0)))
    return LayerAgreement(
        compared=len(wanted),
        equal=equal / max(total, 1),
        steps=steps,
        last=float(np.abs(found[-1] - logits).max() / max(np.abs(logits).max(), 1e-30)),
        in_float16=in_float16,
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
