"""Do files rounded for TensorRT pass our checker, and do they compute what PyTorch simulates?

Each network has random weights (biases too, or the exporter drops additions of zero) and small images. It is rounded by
the "tensorrt" scheme with ranges from 16 images, exported, and checked: findings of `cveff.export.trt_check`, and
logits of 8 other images in ONNX Runtime, graph optimisations off and on, against the simulation.

A value within a float's error of the middle between two steps goes either way, and the next layer's values with it, so
deep networks differ by more than sums in another order alone explain: the simulation in float64 is as far from itself
in float32 ("float64"). So every layer is compared by itself as well: the file's layers are given the simulation's
rounded tensors, and the integers that they return, and the logits, are compared with the simulation's ("equal").

TensorRT itself does not run here. One process a row; rows that are in the file are not measured again:

python tools/benchmarks/trt_check.py    # about half an hour on two cores
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx
import onnxruntime
import torch
from architectures import SIZES, measure, random_model
from torch import Tensor, nn

from cveff.compress.quant.capture import capture, constant, identify
from cveff.compress.quant.network import QuantizedGraph, insert
from cveff.compress.quant.placement import place
from cveff.compress.quant.ranges import Watch, rounding_off, weight_range
from cveff.data.augment import normalize
from cveff.export.layer_check import compare_layers
from cveff.export.normalize import deployable
from cveff.export.onnx import example_images, export
from cveff.export.trt_check import check_tensorrt
from cveff.model import Model, with_module

COLUMNS = (
    "architecture",
    "rounded",
    "of",
    "pairs",
    "findings",
    "equal",
    "steps",
    "off",
    "on",
    "float64",
    "rounding",
)
NOTE = (
    "rounded: layers and products whose inputs both are, of all; equal: share of the roundings' integers that are the "
    "simulation's, given its inputs, and the most steps that one is off; off, on: mean |file - simulation| / mean "
    "|simulation| of the logits, ONNX Runtime's optimisations off and on; float64: the simulation's own; rounding: of "
    "rounding itself"
)


def main() -> None:
    """Every architecture, or what the command line says."""
    names, values = measure(__doc__, __file__, "trt_check.json", row, summary)
    rows = values["rows"]
    common.table("Rounded for TensorRT", COLUMNS, [shown(name, rows[name]) for name in names], NOTE)
    common.console.print_json(json.dumps(values["summary"]))


def row(name: str) -> dict[str, Any]:
    """One architecture's figures."""
    started = time.perf_counter()
    model = random_model(name)
    images = normalize(torch.from_numpy(example_images(16, model, seed=1)), model.spec.input)
    rounded = round_for_tensorrt(model, [images])
    with tempfile.TemporaryDirectory() as folder:
        path = export(rounded, Path(folder) / "model.onnx", check=False)
        findings = check_tensorrt(path)
        graph = onnx.load(path).graph
        images = example_images(8, model, seed=2)
        network = deployable(rounded.module, model.spec.input)
        with torch.inference_mode():
            simulated = network(torch.from_numpy(images)).numpy()
            in_double = double(deployable(rounded.module, model.spec.input), images)
            with rounding_off(network):
                exact = network(torch.from_numpy(images)).numpy()
        by_layer = compare_layers(onnx.load(path), network, images)
        files = {level: logits(path, images, level) for level in ("DISABLE_ALL", "ENABLE_ALL")}
    kinds = Counter(node.op_type for node in graph.node)
    layers = sum(kinds[kind] for kind in ("Conv", "ConvTranspose", "Gemm", "MatMul"))
    return {
        "size": SIZES[name],
        "rounded": num_rounded(graph),
        "layers": layers,
        "pairs": kinds["QuantizeLinear"],
        "findings": [str(finding) for finding in findings],
        **dataclasses.asdict(by_layer),
        "off": difference(files["DISABLE_ALL"], simulated),
        "on": difference(files["ENABLE_ALL"], simulated),
        "float64": None if in_double is None else difference(in_double, simulated),
        "rounding": difference(simulated, exact),
        "same_top1": int((files["DISABLE_ALL"].argmax(1) == simulated.argmax(1)).sum()),
        "seconds": round(time.perf_counter() - started, 1),
    }


def round_for_tensorrt(model: Model, batches: list[Tensor]) -> Model:
    """Ranges of activations are all that `batches` show, of weights the largest of each channel; nothing is repaired.

    Args:
        batches: images (B, C, H, W), normalised.
    """
    graph = capture(model.module, model.spec.input)
    placement = place(graph, "tensorrt")
    roundings = insert(graph, placement)
    watch = Watch(graph, roundings.tensors)
    watch.see(batches)
    for tensor, (low, high) in watch.ranges("minmax").items():
        roundings.tensors[tensor].set_range(torch.tensor(low), torch.tensor(high))
    nodes = identify(graph)
    for site in placement.weights:
        source: Any = nodes[site.reader].args[1]
        weight = constant(graph, source.args[0])
        assert weight is not None
        roundings.weights[site.reader].set_range(*weight_range(weight, site.axis, site.grid))
    return with_module(model, graph, QuantizedGraph.of(model.spec.input, placement))


def num_rounded(graph: onnx.GraphProto) -> int:
    """Layers and products whose first two inputs come from a DequantizeLinear, moved or not."""
    maker = {name: node for node in graph.node for name in node.output}

    def is_rounded(name: str) -> bool:
        node = maker.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape", "Pad", "Unsqueeze", "Squeeze"):
            node = maker.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    return sum(
        all(is_rounded(name) for name in node.input[:2])
        for node in graph.node
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    )


def open_session(model: str | bytes, level: str) -> onnxruntime.InferenceSession:
    """ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def logits(path: Path, images: np.ndarray, level: str) -> np.ndarray:
    """What ONNX Runtime returns for a file."""
    return open_session(str(path), level).run(None, {"images": images})[0]


def double(network: nn.Module, images: np.ndarray) -> np.ndarray | None:
    """The simulation in float64, or None where the network itself asks for float32."""
    try:
        return network.double()(torch.from_numpy(images)).numpy()
    except RuntimeError as error:
        if "type" not in str(error):
            raise
        return None


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """mean |one - other| / mean |other|."""
    return float(np.abs(one - other).mean() / np.abs(other).mean())


def shown(name: str, values: dict[str, Any]) -> list[object]:
    if "error" in values:
        return [f"{name}: {values['error'][:60]}", *[None] * (len(COLUMNS) - 1)]
    keys = ("rounded", "layers", "pairs", "findings", "equal", "steps", "off", "on", "float64", "rounding")
    return [name, *(len(values[key]) if key == "findings" else values[key] for key in keys)]


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows by what came of them."""
    measured = {name: values for name, values in rows.items() if "error" not in values}
    return {
        "architectures": len(rows),
        "without_findings": sum(not values["findings"] for values in measured.values()),
        "as_simulated": sum(agrees(values, "off") for values in measured.values()),
        "as_simulated_optimised": sum(agrees(values, "on") for values in measured.values()),
        "failed": {name: values["error"] for name, values in rows.items() if "error" in values},
    }


def agrees(values: dict[str, Any], level: str) -> bool:
    """Every layer by itself is the simulation's (one value in ten thousand may lie between two steps), and the logits
    of the whole are no further away than twice what the simulation is from itself in float64 (where the network does
    not run in that, from the float network), or 1e-4."""
    is_equal = values["equal"] >= 0.9999 and values["steps"] <= 1 and values["last"] <= 1e-4
    float64 = values["rounding"] if values["float64"] is None else values["float64"]
    return is_equal and bool(values[level] <= max(2 * float64, 1e-4))


if __name__ == "__main__":
    main()
