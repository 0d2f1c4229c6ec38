"""Do networks in float16 and bfloat16 export, pass the checker, and compute what PyTorch computes?

The architectures, random weights and small images of `trt_check`. Each network is converted with ranges from 16 images,
exported (opset 20; bfloat16: 22), checked (`onnx.checker`, `cveff.export.trt_check`), and the file's logits of 8 other
images in ONNX Runtime are compared with PyTorch's in the same precision, and both with float32.

ONNX Runtime's CPU computes float16 with float32 kernels and rounds at its own choice; for bfloat16 it runs a copy with
the file's roundings written out (`cveff.export.bfloat16`). One process a row; rows in the file are not measured again:

python tools/benchmarks/half.py    # about half an hour on two cores
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx
import torch
from architectures import SIZES, measure, random_model
from trt_check import difference, open_session

from cveff.compress.quant.half import HalfPrecision, to_half
from cveff.data.augment import normalize
from cveff.export.bfloat16 import has_bfloat16, in_float32
from cveff.export.normalize import deployable
from cveff.export.onnx import example_images, export
from cveff.export.trt_check import check_tensorrt
from cveff.model import Model, with_module

COLUMNS = ("architecture", "", "16 bits", "float32", "casts", "kept", "findings", "bytes", "file", "rounding")
NOTE = (
    "16 bits, float32: operators; kept: in float32 for their values; bytes: of the file, a parameter; file: mean "
    "|file - PyTorch| / mean |PyTorch| of the logits, both in 16 bits; rounding: PyTorch's in 16 bits from float32"
)


def main() -> None:
    """Every architecture, or what the command line says."""
    names, values = measure(__doc__, __file__, "half.json", row, summary)
    rows = values["rows"]
    common.table("In 16 bits", COLUMNS, [line for name in names for line in shown(name, rows[name])], NOTE)
    common.console.print_json(json.dumps(values["summary"]))


def row(name: str) -> dict[str, Any]:
    """One architecture's figures, by precision."""
    model = random_model(name)
    return {"size": SIZES[name], "fp16": in_precision(model, "fp16"), "bf16": in_precision(model, "bf16")}


def in_precision(model: Model, precision: HalfPrecision) -> dict[str, Any]:
    """The same of one precision."""
    started = time.perf_counter()
    spec = model.spec.input
    calibration = normalize(torch.from_numpy(example_images(16, model, seed=1)), spec)
    found = to_half(model.module, spec, [calibration], precision)
    half = with_module(model, found.graph, found.edit)
    images = example_images(8, model, seed=2)
    with tempfile.TemporaryDirectory() as folder:
        path = export(half, Path(folder) / "model.onnx", check=False)
        proto = onnx.load(path)
        size = path.stat().st_size
    onnx.checker.check_model(proto, full_check=True)
    runnable = in_float32(proto) if has_bfloat16(proto) else proto
    session = open_session(runnable.SerializeToString(), "ENABLE_ALL")
    (logits,) = session.run(None, {"images": images})
    with torch.inference_mode():
        ours = deployable(found.graph, spec)(torch.from_numpy(images)).numpy()
        exact = deployable(model.module, spec)(torch.from_numpy(images)).numpy()
    return {
        "half": found.num_half,
        "float": found.num_float,
        "casts": found.casts,
        "file_casts": sum(node.op_type == "Cast" for node in proto.graph.node),
        "kept": {item.operator: item.reason for item in found.kept},
        "findings": [str(finding) for finding in check_tensorrt(proto)],
        "bytes_a_parameter": size / model.num_parameters,
        "file": difference(logits, ours),
        "largest": float(np.abs(logits - ours).max() / np.abs(ours).max()),
        "rounding": difference(ours, exact),
        "same_top1": int((logits.argmax(1) == exact.argmax(1)).sum()),
        "seconds": round(time.perf_counter() - started, 1),
    }


def shown(name: str, values: dict[str, Any]) -> list[list[object]]:
    """Two lines of the table."""
    if "error" in values:
        return [[f"{name}: {values['error'][:60]}", *[None] * (len(COLUMNS) - 1)]]
    return [
        [
            name, precision, found["half"], found["float"], found["casts"], len(found["kept"]),
            len(found["findings"]), found["bytes_a_parameter"], found["file"], found["rounding"],
        ]
        for precision in ("fp16", "bf16")
        for found in [values[precision]]
    ]  # fmt: skip


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows by what came of them."""
    measured = [values for values in rows.values() if "error" not in values]
    return {
        "architectures": len(rows),
        "failed": {name: values["error"] for name, values in rows.items() if "error" in values},
        **{
            precision: {
                "without_findings": sum(not values[precision]["findings"] for values in measured),
                "largest_difference": max(
                    (values[precision]["largest"] for values in measured), default=None
                ),
                "same_top1": sum(values[precision]["same_top1"] == 8 for values in measured),
            }
            for precision in ("fp16", "bf16")
        },
    }


if __name__ == "__main__":
    main()
