"""Choose how each weight is rounded to int8 from what the layer sees, before a quantizer rounds it to the nearest.

Rounding to the nearest minimises the error of each weight; what matters is the error of the layer's output. Column
by column, the error of the weights rounded so far is made up for by those still to be rounded (Frantar et al.,
"GPTQ", ICLR 2023; Hassibi & Stork's optimal brain surgeon), with the second moments of the layer's inputs on
calibration images. What is left of the mean error goes into the bias (Nagel et al., "Data-Free Quantization Through
Weight Equalization and Bias Correction", ICCV 2019). It costs nothing at run time: the result is a float32
file whose weights already lie on the int8 grid, so any quantizer with per-channel symmetric weights keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from cveff.export.calibration import batches, check_calibration
from cveff.export.graph import read_onnx
from cveff.files import atomic_path

POSITIONS = 64
"""Output positions an image contributes to a layer's second moments, drawn at random."""
MAX_INPUTS = 1280
"""Most inputs to an output for which errors are made up for; larger layers only get their bias corrected."""
DAMPING = 0.01
"""Added to the second moments' diagonal, relative to its mean, so that inputs never seen do not divide by zero."""
BLOCK = 64
LEVELS = 127


def round_weights(
    source: str | Path, destination: str | Path, calibration: np.ndarray, *, seed: int = 0
) -> Path:
    """Write a float32 copy of an exported file whose convolutions' and `Gemm`s' weights lie on the int8 grid.

    Other layers (`MatMul`) are left as they are.

    Args:
        source: a file written by `export`.
        destination: the file to write, atomically.
        calibration: (N, H, W, C) uint8.
        seed: of the positions drawn.

    Returns:
        `destination`.

    Raises:
        ExportError: not an exported file, or unusable calibration images.
    """
    source, destination = Path(source), Path(destination)
    proto = read_onnx(source)
    check_calibration(calibration, proto)
    layers = _layers(proto)
    _observe(proto, layers, calibration, np.random.default_rng(seed))
    constants = {item.name: item for item in proto.graph.initializer}
    for layer in layers:
        rounded = layer.rounded()
        correction = layer.mean_error(rounded)
        constants[layer.node.input[1]].CopyFrom(
            numpy_helper.from_array(layer.as_stored(rounded), layer.node.input[1])
        )
        _shift_bias(proto, constants, layer.node, correction)
    used = {name for node in proto.graph.node for name in node.input}
    for item in [item for item in proto.graph.initializer if item.name not in used]:
        proto.graph.initializer.remove(item)
    with atomic_path(destination) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
    return destination


@dataclass
class _Layer:
    """One Conv or Gemm: weights as (groups, outputs, inputs), and moments of what reaches those inputs."""

    node: onnx.NodeProto
    weight: np.ndarray
    shape: tuple[int, ...]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]
    is_linear: bool
    moments: np.ndarray | None = None
    total: np.ndarray | None = None
    count: int = 0

    def observe(self, x: np.ndarray, generator: np.random.Generator) -> None:
        """Add a batch of the layer's inputs, (N, C, H, W) or (N, C), to the moments."""
        samples = x[None] if self.is_linear else self._patches(x, generator)  # (groups, samples, inputs)
        if self.total is None:
            self.total = np.zeros((samples.shape[0], samples.shape[2]))
            if samples.shape[2] <= MAX_INPUTS:
                self.moments = np.zeros((samples.shape[0], samples.shape[2], samples.shape[2]))
        self.total += samples.sum(axis=1, dtype=np.float64)
        self.count += samples.shape[1]
        if self.moments is not None:
            self.moments += samples.transpose(0, 2, 1) @ samples

    def rounded(self) -> np.ndarray:
        """The weights on the int8 grid, (groups, outputs, inputs) float64."""
        scale = np.abs(self.weight).max(axis=2, keepdims=True) / LEVELS
        scale = np.where(scale > 0, scale, 1.0)
        if self.moments is None:
            return np.round(self.weight / scale) * scale
        return _compensated(self.weight, scale, self.moments / self.count)

    def mean_error(self, rounded: np.ndarray) -> np.ndarray:
        """What rounding adds to each output on average, (outputs of all groups,)."""
        assert self.total is not None
        return ((rounded - self.weight) @ (self.total / self.count)[:, :, None]).reshape(-1)

    def as_stored(self, weight: np.ndarray) -> np.ndarray:
        """(groups, outputs, inputs) -> the initializer's own shape, float32."""
        return weight.reshape(self.shape).astype(np.float32)

    def _patches(self, x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.strides, self.dilations
        top, left, bottom, right = self.pads
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
        width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
        num = min(POSITIONS, height * width)
        where = generator.choice(height * width, num, replace=False)
        rows = (where // width)[:, None, None] * sh + np.arange(kh)[None, :, None] * dh  # (P, kh, 1)
        columns = (where % width)[:, None, None] * sw + np.arange(kw)[None, None, :] * dw  # (P, 1, kw)
        patches = x[:, :, rows, columns]  # (N, C, P, kh, kw)
        groups, inputs = self.weight.shape[0], self.weight.shape[2]
        patches = patches.reshape(len(x), groups, -1, num, kh * kw)  # (N, G, C/G, P, kh*kw)
        return patches.transpose(1, 0, 3, 2, 4).reshape(groups, len(x) * num, inputs)


def _compensated(weight: np.ndarray, scale: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Round column by column; the columns to come make up for each error.

    Args:
        weight: (groups, outputs, inputs); scale: (groups, outputs, 1); moments: (groups, inputs, inputs).
    """
    diagonal = np.einsum("gii->gi", moments)
    damping = DAMPING * diagonal.mean(axis=1, keepdims=True) + 1e-12
    moments = moments + damping[:, :, None] * np.eye(moments.shape[1])
    # Inputs that matter most are rounded first, while there are others left to make up for them.
    order = np.argsort(-diagonal, axis=1)  # (groups, inputs)
    moments = np.take_along_axis(np.take_along_axis(moments, order[:, :, None], 1), order[:, None, :], 2)
    remaining = np.take_along_axis(weight, np.broadcast_to(order[:, None, :], weight.shape), 2).copy()
    is_zero = remaining == 0  # a sparse weight's zeros are not for making up: they stay
    largest = np.abs(remaining).argmax(axis=2)  # the grid is made from this weight, so it stays where it is
    inverse = np.linalg.cholesky(np.linalg.inv(moments)).transpose(0, 2, 1)  # upper triangular
    rounded = np.empty_like(remaining)
    kept = np.take_along_axis(remaining, largest[:, :, None], 2)[:, :, 0]
    inputs = remaining.shape[2]
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = np.empty((*remaining.shape[:2], stop - start))
        for column in range(start, stop):
            value = remaining[:, :, column]
            nearest = np.clip(np.round(value / scale[:, :, 0]), -LEVELS, LEVELS) * scale[:, :, 0]
            nearest = np.where(largest == column, kept, nearest)
            nearest = np.where(is_zero[:, :, column], 0.0, nearest)
            rounded[:, :, column] = nearest
            error = (value - nearest) / inverse[:, None, column, column]
            remaining[:, :, column:stop] -= error[:, :, None] * inverse[:, None, column, column:stop]
            errors[:, :, column - start] = error
        # The columns after the block are brought up to date at once, by one matrix product.
        remaining[:, :, stop:] -= errors @ inverse[:, start:stop, stop:]
    back = np.argsort(order, axis=1)
    return np.take_along_axis(rounded, np.broadcast_to(back[:, None, :], rounded.shape), 2)


def _layers(proto: onnx.ModelProto) -> list[_Layer]:
    """Every Conv (two spatial dimensions) and Gemm whose weights are constants used once."""
    constants = {item.name: item for item in proto.graph.initializer}
    uses = [name for node in proto.graph.node for name in node.input]
    found = []
    for node in proto.graph.node:
        if (
            node.op_type not in ("Conv", "Gemm")
            or node.input[1] not in constants
            or uses.count(node.input[1]) != 1
        ):
            continue
        values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        stored = numpy_helper.to_array(constants[node.input[1]]).astype(np.float64)
        if node.op_type == "Gemm":
            if values.get("transB", 0) != 1 or values.get("transA", 0) or values.get("alpha", 1.0) != 1.0:
                continue
            found.append(_Layer(node, stored[None], stored.shape, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), True))
        elif stored.ndim == 4 and values.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID"):
            groups = values.get("group", 1)
            found.append(
                _Layer(
                    node,
                    stored.reshape(groups, stored.shape[0] // groups, -1),
                    stored.shape,
                    (stored.shape[2], stored.shape[3]),
                    tuple(values.get("strides", (1, 1))),
                    tuple(values.get("dilations", (1, 1))),
                    tuple(values.get("pads", (0, 0, 0, 0))),
                    False,
                )
            )
    return found


def _observe(
    proto: onnx.ModelProto, layers: list[_Layer], calibration: np.ndarray, generator: np.random.Generator
) -> None:
    inputs = list(dict.fromkeys(layer.node.input[0] for layer in layers))
    if not inputs:
        return
    for values in _activations(proto, inputs, calibration):
        for layer in layers:
            layer.observe(values[layer.node.input[0]], generator)


def _activations(
    proto: onnx.ModelProto, names: list[str], calibration: np.ndarray
) -> Iterator[dict[str, np.ndarray]]:
    """Inner tensors of the float graph, batch by batch."""
    import onnxruntime

    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    already = {item.name for item in watched.graph.output}
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in already
    )
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = session.get_inputs()[0].name
    for images in batches(calibration):
        yield dict(zip(names, session.run(names, {feed: images}), strict=True))


def _shift_bias(
    proto: onnx.ModelProto, constants: dict[str, onnx.TensorProto], node: onnx.NodeProto, error: np.ndarray
) -> None:
    """Take `error`, (outputs,), off the layer's bias, which is added where there is none."""
    if len(node.input) > 2 and node.input[2] and node.input[2] not in constants:
        return  # a computed bias: leave it
    has_bias = len(node.input) > 2 and node.input[2] != ""
    bias = numpy_helper.to_array(constants[node.input[2]]) if has_bias else np.zeros(len(error))
    name = f"{node.output[0]}_corrected_bias"
    proto.graph.initializer.append(
        numpy_helper.from_array((np.broadcast_to(bias, error.shape) - error).astype(np.float32), name)
    )
    if len(node.input) > 2:
        node.input[2] = name
    else:
        node.input.append(name)
