"""Sections of choices.py on ONNX Runtime: what normalisation inside the graph costs, and int8 by our settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peers
from onnx import TensorProto, helper, numpy_helper
from workshop import THREADS, Opener, Workshop, centred_cosine, run_all

from cveff.export.graph import preprocessing_nodes
from cveff.measure.parity import relative_difference
from cveff.runtime.engines import open_file

FLOAT, CHANNEL_SCALED, CHANNEL, ROW = "float input", "channel, scale", "channel", "row"
MODELS = ("mobilenetv3_small_100", "resnet18", "vit_tiny_patch16_224")
FP32, OURS, TOOLS, NO_ARGUMENTS = "ours fp32", "ours int8", "tool's int8", "no arguments"


def uint8_input(workshop: Workshop) -> dict[str, Any]:
    """One graph with four heads: normalised outside, and three ways to write normalisation inside."""
    name = "mobilenetv3_small_100"
    images = workshop.held_out(name)[:1]
    int8 = workshop.rounded(name)
    found: dict[str, Any] = {"model": name, "engines": {}}
    for label, source, opens in (
        ("ONNX Runtime fp32", workshop.exported(name), open_plain),
        ("ONNX Runtime int8", int8, open_plain),
        ("OpenVINO f32", workshop.exported(name), static_openvino),
    ):
        openers = {
            head: opens(with_head(source, head), floats_of(source, images) if head == FLOAT else images)
            for head in heads(source)
        }
        logits = {head: opener()(images) for head, opener in openers.items()}
        found["engines"][label] = {
            "times": workshop.times(openers, images, reference=FLOAT),
            "largest_difference": max(
                relative_difference(values, logits[FLOAT]) for values in logits.values()
            ),
        }
    return found


def heads(source: Path) -> tuple[str, ...]:
    """Ways to write a file's normalisation: a scale a channel that stands before a rounding cannot be folded."""
    _, _, scale = _head(onnx.load(source))
    return (FLOAT, CHANNEL_SCALED, CHANNEL, ROW) if scale is None else (FLOAT, CHANNEL_SCALED, ROW)


def with_head(source: Path, head: str) -> Path:
    """A copy of an exported file whose normalisation is written another way; it computes the same function."""
    destination = source.with_suffix(f".{head.replace(', ', '-').replace(' ', '-')}.onnx")
    proto = onnx.load(source)
    nodes, offset, factor = _head(proto)
    if head != ROW:
        graph, normalised = proto.graph, nodes[-1].output[0]
        for node in nodes:
            graph.node.remove(node)
        if head == FLOAT:
            _, height, width, channels = graph.input[0].type.tensor_type.shape.dim
            shape = ["batch", channels.dim_value, height.dim_value, width.dim_value]
            graph.input[0].CopyFrom(helper.make_tensor_value_info(normalised, TensorProto.FLOAT, shape))
        else:
            new = [
                helper.make_node("Transpose", ["images"], ["head.nchw"], perm=[0, 3, 1, 2], name="head.nchw"),
                helper.make_node(
                    "Cast", ["head.nchw"], ["head.float"], to=TensorProto.FLOAT, name="head.float"
                ),
            ]
            subtracted = "head.subtracted" if head == CHANNEL_SCALED else normalised
            new.append(
                helper.make_node("Sub", ["head.float", "head.offset"], [subtracted], name="head.subtract")
            )
            graph.initializer.append(
                numpy_helper.from_array(offset[0, 0, 0].reshape(1, -1, 1, 1), "head.offset")
            )
            if head == CHANNEL_SCALED:
                scale = np.float32(1 / 64)  # any value costs the same; a power of two keeps every bit
                new.append(
                    helper.make_node("Mul", [subtracted, "head.scale"], [normalised], name="head.scale")
                )
                values = (
                    np.full((1, offset.shape[-1], 1, 1), scale)
                    if factor is None
                    else factor[0, 0, 0].reshape(1, -1, 1, 1)
                )
                graph.initializer.append(numpy_helper.from_array(values, "head.scale"))
                if factor is None:
                    _undo_scale(graph, normalised, scale)
            for index, node in enumerate(new):
                graph.node.insert(index, node)
    onnx.checker.check_model(proto)
    onnx.save(proto, destination)
    return destination


def floats_of(source: Path, images: np.ndarray) -> np.ndarray:
    """What the float head takes: float32 (N, C, H, W)."""
    _, offset, factor = _head(onnx.load(source))
    floats = images.astype(np.float32) - offset
    return np.ascontiguousarray((floats if factor is None else floats * factor).transpose(0, 3, 1, 2))


def _head(proto: onnx.ModelProto) -> tuple[list[onnx.NodeProto], np.ndarray, np.ndarray | None]:
    """The nodes Cast, Sub, perhaps Mul, and Transpose; what is subtracted and multiplied with, (1, 1, W, C)."""
    names = preprocessing_nodes(proto)
    nodes = [node for name in names for node in proto.graph.node if node.name == name]
    kinds = [node.op_type for node in nodes]
    if kinds not in (["Cast", "Sub", "Transpose"], ["Cast", "Sub", "Mul", "Transpose"]):
        raise SystemExit(f"the exported head is {kinds}, not Cast, Sub, Transpose")
    constants = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    return nodes, constants[nodes[1].input[1]], constants[nodes[2].input[1]] if "Mul" in kinds else None


def _undo_scale(graph: onnx.GraphProto, name: str, scale: np.float32) -> None:
    """Make whatever reads `name` take values that are `scale` times as large as before."""
    (reader,) = [node for node in graph.node if name in node.input]
    index = {"Conv": 1, "QuantizeLinear": 1}[reader.op_type]
    old = next(item for item in graph.initializer if item.name == reader.input[index])
    values = numpy_helper.to_array(old)
    new = values / scale if reader.op_type == "Conv" else values * scale
    graph.initializer.append(numpy_helper.from_array(new.astype(np.float32), "head.undone"))
    reader.input[index] = "head.undone"


def open_plain(path: Path, values: np.ndarray) -> Opener:
    """ONNX Runtime by its defaults, on one thread, always run on `values`."""

    def opener() -> peers.FloatPredictor:
        call = peers.open_onnxruntime(path, THREADS)
        return lambda _: call(values)

    return opener


def static_openvino(path: Path, values: np.ndarray) -> Opener:
    """OpenVINO in float32 on one thread, compiled for the shape of `values` and always run on them."""

    def opener() -> peers.FloatPredictor:
        import openvino

        model = openvino.Core().read_model(str(path))
        model.reshape(list(values.shape))
        call = peers.open_openvino(model, THREADS, "f32")
        return lambda _: call(values)

    return opener


def rows_of_three(workshop: Workshop) -> dict[str, Any]:
    """Subtraction over NHWC by a constant of one value a channel, and of one image row: the same numbers."""
    images = np.zeros((1, 224, 224, 3), np.uint8)
    values = np.random.default_rng(0).standard_normal(images.shape, dtype=np.float32)
    openers: dict[str, Opener] = {}
    for name, width in (("row", 224), ("channel", 1)):
        constant = np.broadcast_to(np.float32([123.7, 116.3, 103.5]), (1, 1, width, 3))
        graph = helper.make_graph(
            [helper.make_node("Sub", ["x", "constant"], ["y"])],
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, images.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, images.shape)],
            [numpy_helper.from_array(np.ascontiguousarray(constant), "constant")],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        path = workshop.folder / f"subtract.{name}.onnx"
        onnx.save(proto, path)
        openers[name] = open_plain(path, values)
    return {
        "shape": list(images.shape),
        "times": workshop.times(openers, images, reference="row"),
        "largest_difference": relative_difference(*(opener()(images) for opener in openers.values())),
    }


def int8(workshop: Workshop) -> dict[str, Any]:
    """Our int8 against `quant_pre_process` and `quantize_static` on a plain export."""
    found: dict[str, Any] = {"models": {}}
    for name in workshop.some(MODELS):
        spec = workshop.model(name).spec.input
        calibration, held_out = workshop.calibration(name), workshop.held_out(name)
        floats = peers.normalised(calibration, spec)
        ours = workshop.rounded(name)
        plain = workshop.plain(name)
        peer = {TOOLS: peers.onnxruntime_int8(plain, workshop.folder / f"{name}.tool.onnx", floats)}
        if not name.startswith("vit"):
            peer[NO_ARGUMENTS] = peers.onnxruntime_int8(
                plain, workshop.folder / f"{name}.none.onnx", floats, arguments=False
            )
        ours_files = {FP32: workshop.exported(name), OURS: ours}
        opened: dict[str, Opener] = {label: open_ours(path) for label, path in ours_files.items()}
        held_out_floats = peers.normalised(held_out, spec)
        logits = {label: run_all(opener(), held_out) for label, opener in opened.items()}
        for label, path in peer.items():
            logits[label] = run_all(peers.open_onnxruntime(path, THREADS), held_out_floats)
        found["models"][name] = {
            "cosine": {label: centred_cosine(values, logits[FP32]) for label, values in logits.items()},
            "by_batch": {},
        }
        for batch in workshop.batches:
            timed = opened | {
                label: open_plain(path, held_out_floats[:batch]) for label, path in peer.items()
            }
            found["models"][name]["by_batch"][str(batch)] = workshop.times(
                timed, held_out[:batch], reference=OURS
            )
    return found


def open_ours(path: Path) -> Opener:
    """The file as cveff's runtime runs it, on one thread."""
    return lambda: open_file("onnxruntime", path, threads=THREADS)
