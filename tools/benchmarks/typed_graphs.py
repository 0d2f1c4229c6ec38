"""Do networks in float32, float16, bfloat16 and int8 become graphs that TensorRT takes, and compute what PyTorch does?

Forty architectures with random weights. Ranges are those of 16 crops of photographs; 16 crops of other photographs are
judged. Each network is exported (opset 20; bfloat16: 22), checked (`onnx.checker`, `cveff.export.trt_check`), and the
file's logits in ONNX Runtime are compared with PyTorch's in the same precision. "int8" is the "tensorrt" scheme with
the rest in float16; its layers are compared one by one, each given the simulation's rounded tensors.

ONNX Runtime's CPU computes float16 with float32 kernels and rounds at its own choice; for bfloat16 it runs a copy with
the file's roundings written out (`cveff.export.bfloat16`). TensorRT itself does not run here. One process a row; rows
in the file are not measured again:

python tools/benchmarks/typed_graphs.py --jobs 2    # about an hour on two cores
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx
import photos
import torch
from architectures import SIZES, measure, random_model
from torch import Tensor
from trt_check import difference, open_session, round_for_tensorrt

from cveff.compress.quant.reduced import reduce_floats, reduce_rest
from cveff.data.augment import normalize
from cveff.export.bfloat16 import has_bfloat16, in_float32
from cveff.export.layer_check import compare_layers
from cveff.export.normalize import deployable
from cveff.export.onnx import export
from cveff.export.trt_check import check_tensorrt
from cveff.model import Model
from cveff.progress import Silent
from cveff.runtime.preprocess import preprocess

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
IMAGES = 16
MOST = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1}
"""Largest |file - PyTorch| / largest |PyTorch| of the logits, both in the same precision."""
COLUMNS = ("architecture", "", "findings", "casts", "in float32", "bytes", "file", "from float32", "top-1")
NOTE = (
    "casts: in the file; in float32: operators that stay for their values; bytes: of the file, a parameter; file: "
    "largest |file - PyTorch| / largest |PyTorch| of the logits, both in that precision (int8: of a layer that is "
    "given the simulation's tensors); from float32: mean |PyTorch - float32| / mean |float32|; top-1: of 16 crops, "
    "the file's that are PyTorch's in float32"
)


def main() -> None:
    """Every architecture, or what the command line says."""
    names, values = measure(__doc__, __file__, "typed_graphs.json", row, summary)
    rows = values["rows"]
    common.table("Typed graphs", COLUMNS, [line for name in names for line in shown(name, rows[name])], NOTE)
    common.console.print_json(json.dumps(values["summary"]))


def row(name: str) -> dict[str, Any]:
    """One architecture's figures, by precision."""
    model = random_model(name)
    first, second = photos.split(photos.photographs(), 0)
    seen, held = (
        preprocess(photos.crops(half, IMAGES, model.spec.input, 0), model.spec.input)
        for half in (first, second)
    )
    calibration = [normalize(torch.from_numpy(seen), model.spec.input)]
    found: dict[str, Any] = {"size": SIZES[name]}
    for precision in PRECISIONS:
        started, told = time.perf_counter(), Told()
        converted = convert(model, precision, calibration, told)
        figures = judge(model, converted, precision, held)
        seconds = round(time.perf_counter() - started, 1)
        found[precision] = {**figures, "said": told.lines, "seconds": seconds}
    return found


class Told(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        """Keep a line."""
        self.lines.append(text)


def convert(model: Model, precision: str, calibration: list[Tensor], progress: Told) -> Model:
    """The network in a precision."""
    if precision == "fp32":
        return model
    if precision == "int8":
        return reduce_rest(round_for_tensorrt(model, calibration), calibration, (), progress)
    return reduce_floats(model, precision, calibration, (), progress)  # type: ignore[arg-type]


def judge(model: Model, converted: Model, precision: str, images: np.ndarray) -> dict[str, Any]:
    """Export, check, and compare."""
    spec = model.spec.input
    with tempfile.TemporaryDirectory() as folder:
        path = export(converted, Path(folder) / "model.onnx", check=False)
        proto, size = onnx.load(path), path.stat().st_size
    onnx.checker.check_model(proto, full_check=True)
    runnable = in_float32(proto) if has_bfloat16(proto) else proto
    (logits,) = open_session(runnable.SerializeToString(), "DISABLE_ALL").run(None, {"images": images})
    network = deployable(converted.module, spec)
    with torch.inference_mode():
        ours = network(torch.from_numpy(images)).numpy()
        exact = deployable(model.module, spec)(torch.from_numpy(images)).numpy()
    figures: dict[str, Any] = {
        "findings": [str(finding) for finding in check_tensorrt(proto)],
        "casts": sum(node.op_type == "Cast" for node in proto.graph.node),
        "bytes_a_parameter": size / model.num_parameters,
        "from_float32": difference(ours, exact),
        "same_top1": int((logits.argmax(1) == exact.argmax(1)).sum()),
        "same_top1_as_simulated": int((logits.argmax(1) == ours.argmax(1)).sum()),
    }
    if precision == "int8":
        layers = compare_layers(proto, network, images)
        holds = layers.holds
        figures |= {**dataclasses.asdict(layers), "largest": layers.last}
    else:
        figures["largest"] = float(np.abs(logits - ours).max() / np.abs(ours).max())
        holds = figures["largest"] <= MOST[precision]
    return {**figures, "passes": bool(holds) and not figures["findings"]}


def shown(name: str, values: dict[str, Any]) -> list[list[object]]:
    """A line of the table for each precision."""
    if "error" in values:
        return [[f"{name}: {values['error'][:60]}", *[None] * (len(COLUMNS) - 1)]]
    return [
        [
            name, precision, len(found["findings"]), found["casts"], max(len(found["said"]) - 1, 0),
            found["bytes_a_parameter"], found["largest"], found["from_float32"], found["same_top1"],
        ]
        for precision in PRECISIONS
        for found in [values[precision]]
    ]  # fmt: skip


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows by what came of them."""
    measured = {name: values for name, values in rows.items() if "error" not in values}
    return {
        "architectures": len(rows),
        "failed": {name: values["error"] for name, values in rows.items() if "error" in values},
        **{
            precision: {
                "passes": sum(values[precision]["passes"] for values in measured.values()),
                "misses": [name for name, values in measured.items() if not values[precision]["passes"]],
                "largest_difference": max(
                    (values[precision]["largest"] for values in measured.values()), default=None
                ),
                "same_top1": sum(values[precision]["same_top1"] == IMAGES for values in measured.values()),
            }
            for precision in PRECISIONS
        },
    }


if __name__ == "__main__":
    main()
