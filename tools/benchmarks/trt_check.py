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

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

import cveff
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

SIZES = {
    "resnet50": 64,
    "regnety_002": 64,
    "densenet121": 64,
    "vgg11_bn": 64,
    "mobilenetv2_100": 64,
    "mobilenetv3_large_100": 64,
    "mobilenetv4_conv_small": 64,
    "efficientnet_b0": 64,
    "efficientnet_lite0": 64,
    "ghostnetv2_100": 64,
    "lcnet_100": 64,
    "repvgg_a0": 64,
    "hgnetv2_b0": 64,
    "res2net50_14w_8s": 64,
    "fastvit_t8": 64,
    "convnext_atto": 64,
    "convnextv2_atto": 64,
    "inception_next_tiny": 64,
    "edgenext_xx_small": 64,
    "poolformerv2_s12": 64,
    "vit_tiny_patch16_224": 64,
    "deit3_small_patch16_224": 64,
    "swin_tiny_patch4_window7_224": 64,
    "swinv2_tiny_window8_256": 64,
    "levit_128s": 224,
    "mobilevitv2_050": 64,
    "efficientformerv2_s0": 224,
    "tiny_vit_5m_224": 64,
    "coatnet_nano_rw_224": 224,
    "efficientvit_b0": 64,
    "mixer_s32_224": 64,
    "caformer_s18": 64,
    "davit_tiny": 64,
    "pvt_v2_b0": 64,
}
"""Architecture -> side of its images."""
QUICK = ("mobilenetv4_conv_small", "vit_tiny_patch16_224")
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two architectures, results are not committed")
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--row", help="measure one architecture and print it")
    parser.add_argument("--jobs", type=int, default=1, help="rows measured at a time")
    parser.add_argument("--seconds", type=int, default=600, help="limit for a row")
    arguments = parser.parse_args()
    if arguments.row:
        torch.set_num_threads(1)
        print(json.dumps(row(arguments.row)))
        return
    names = QUICK if arguments.quick else tuple(SIZES)
    out = arguments.out or common.output("trt_check.json", arguments.quick)
    results = common.Results(out, __file__, {"seed": 0, "images": 16}, fresh=arguments.fresh)
    rows = results.values.setdefault("rows", {})
    missing = [name for name in names if "error" in rows.get(name, {"error": ""})]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pending = {pool.submit(in_process, __file__, name, arguments.seconds): name for name in missing}
        for done in as_completed(pending):
            rows[pending[done]] = done.result()
            results.values["summary"] = summary(rows)
            results.save()
    results.values["rows"] = rows = {name: rows[name] for name in names}
    results.values["summary"] = summary(rows)
    results.save()
    common.table("Rounded for TensorRT", COLUMNS, [shown(name, rows[name]) for name in names], NOTE)
    common.console.print_json(json.dumps(results.values["summary"]))


def row(name: str) -> dict[str, Any]:
    """One architecture's figures."""
    started = time.perf_counter()
    model = random_model(name)
    rounded = round_for_tensorrt(model)
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


def random_model(name: str) -> Model:
    """Random weights, and biases that are not zero."""
    torch.manual_seed(0)
    model = cveff.create(name, 10, image_size=SIZES[name])
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.module.eval()
    return model


def round_for_tensorrt(model: Model) -> Model:
    """Ranges of activations are all that was seen, of weights the largest of each channel; nothing is repaired."""
    images = normalize(torch.from_numpy(example_images(16, model, seed=1)), model.spec.input)
    graph = capture(model.module, model.spec.input)
    placement = place(graph, "tensorrt")
    roundings = insert(graph, placement)
    watch = Watch(graph, roundings.tensors)
    watch.see([images])
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


def in_process(script: str, name: str, seconds: int) -> dict[str, Any]:
    """A script's `--row` in a process of its own; what went wrong under "error"."""
    call = [sys.executable, script, "--row", name]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {seconds} s"}
    if done.returncode:
        return {
            "error": done.stderr.strip().splitlines()[-1][:300] if done.stderr else f"exit {done.returncode}"
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


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
