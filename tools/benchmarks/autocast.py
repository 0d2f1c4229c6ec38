"""Float16 graphs: `cveff.Quantize("fp16")` against Model Optimizer's AutoCast, which other exporters use.

The architectures of `architectures.py`, random weights, as they are and "large": one group of channels is multiplied
until its values reach three times what float16 holds, and the weights that read it are divided, which leaves the
network as it was. Both tools see the same 16 crops of photographs and are judged by 16 of others, in ONNX Runtime, with
its optimisations off: so every value is rounded where the file says, and nowhere else. AutoCast gets the file that
cveff exports in float32.

An environment of its own is made for AutoCast in .venv-modelopt. One process a row; rows that are in the file are not
measured again:

python tools/benchmarks/autocast.py --jobs 2    # about half an hour on two cores
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import modelopt_peer
import numpy as np
import onnx
import photos
import torch
from architectures import measure, random_model
from onnx import TensorProto
from torch import Tensor
from trt_check import difference, open_session

from cveff.compress.quant.capture import capture
from cveff.compress.quant.channel_groups import channel_groups
from cveff.compress.quant.layers import Observe, parameter
from cveff.compress.quant.reduced import reduce_floats
from cveff.data.augment import normalize
from cveff.export.onnx import export
from cveff.export.trt_check import check_tensorrt
from cveff.model import Model
from cveff.runtime.preprocess import preprocess

IMAGES = 16
LARGEST = 3 * 65504.0
HOLDS = 0.02
"""Largest mean |file - float32| / mean |float32| of a file that holds."""
PYTHON = "CVEFF_MODELOPT_PYTHON"
"""Environment variable: the interpreter of an environment that has Model Optimizer already."""
TOOLS = ("cveff", "autocast")
COLUMNS = (
    "architecture",
    "values",
    "tool",
    "from float32",
    "top-1",
    "findings",
    "casts",
    "in float32",
    "bytes",
    "s",
)
NOTE = (
    "from float32: mean |file - float32| / mean |float32| of the logits; top-1: of 16 crops; findings: of "
    "cveff.export.trt_check; in float32: convolutions and products with inputs in float32; bytes: of the file, a "
    "parameter; s: seconds of the conversion, cveff's with its export"
)


def main() -> None:
    """Every architecture, or what the command line says."""
    names, values = measure(__doc__, __file__, "autocast.json", row, summary)
    common.table(
        "float16", COLUMNS, [line for name in names for line in shown(name, values["rows"][name])], NOTE
    )
    common.console.print_json(json.dumps(values["summary"]))


def row(name: str) -> dict[str, Any]:
    """One architecture's figures, by values and tool."""
    python = modelopt_peer.interpreter(Path(os.environ[PYTHON]) if PYTHON in os.environ else None)
    usual = random_model(name)
    first, second = photos.split(photos.photographs(), 0)
    seen, held = (
        preprocess(photos.crops(half, IMAGES, usual.spec.input, 0), usual.spec.input)
        for half in (first, second)
    )
    batches = [normalize(torch.from_numpy(seen), usual.spec.input)]
    found: dict[str, Any] = {"versions": modelopt_peer.versions(python)}
    for values, model in {"usual": usual, "large": with_large_values(usual, batches[0])}.items():
        if model is None:  # no channels that can be multiplied and divided
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = export(model, Path(folder) / "float32.onnx", check=False)
            exact = run(source, held)

            def ours(path: Path, model: Model = model) -> float:
                started = time.perf_counter()
                export(reduce_floats(model, "fp16", batches), path, check=False)
                return time.perf_counter() - started

            def theirs(path: Path, source: Path = source) -> float:
                return modelopt_peer.autocast(python, source, path, seen)

            found[values] = {
                tool: judge(convert, Path(folder) / f"{tool}.onnx", exact, held, model.num_parameters)
                for tool, convert in zip(TOOLS, (ours, theirs), strict=True)
            }
    return found


@torch.no_grad()
def with_large_values(model: Model, images: Tensor) -> Model | None:
    """The same function with channels that reach `LARGEST`; None where no group of channels can be rescaled."""
    graph = capture(model.module, model.spec.input)
    groups = channel_groups(graph)
    if not groups:
        return None
    group = groups[len(groups) // 2]
    reached: list[float] = []
    Observe(graph, group.tensors, lambda _node, _taken, value: reached.append(float(value.abs().max()))).run(
        images
    )
    factor = LARGEST / max(reached)
    for path in group.divided:
        parameter(graph, path).mul_(factor)
    for reader in group.readers:
        reader.put(graph, (reader.matrix(graph) / factor).reshape(parameter(graph, reader.weight).shape))
    return Model(model.spec, graph)


def judge(
    convert: Callable[[Path], float], path: Path, exact: np.ndarray, images: np.ndarray, parameters: int
) -> dict[str, Any]:
    """Convert, and compare with float32; what went wrong under "error"."""
    try:
        seconds = convert(path)
        logits = run(path, images)
    except Exception as error:  # noqa: BLE001 - a tool that fails is a result
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "holds": False}
    proto = onnx.load(path)
    far = difference(logits, exact) if np.isfinite(logits).all() else None
    return {
        "from_float32": far,
        "same_top1": int((logits.argmax(1) == exact.argmax(1)).sum()),
        "findings": [str(finding) for finding in check_tensorrt(proto)],
        "casts": sum(node.op_type == "Cast" for node in proto.graph.node),
        "in_float32": heavy_in_float32(proto),
        "bytes_a_parameter": path.stat().st_size / parameters,
        "seconds": round(seconds, 2),
        "holds": far is not None and far <= HOLDS,
    }


def run(path: Path, images: np.ndarray) -> np.ndarray:
    """Logits in ONNX Runtime as the file is written, float32."""
    session = open_session(str(path), "DISABLE_ALL")
    return session.run(None, {session.get_inputs()[0].name: images})[0].astype(np.float32)


def heavy_in_float32(proto: onnx.ModelProto) -> int:
    """Convolutions and products that read float32."""
    typed = onnx.shape_inference.infer_shapes(proto)
    graph = typed.graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    types |= {value.name: value.data_type for value in graph.initializer}
    heavy = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return sum(types.get(node.input[0]) == TensorProto.FLOAT for node in heavy)


def shown(name: str, values: dict[str, Any]) -> list[list[object]]:
    """A line of the table for each tool and kind of values."""
    if "error" in values:
        return [[f"{name}: {values['error'][:60]}", *[None] * (len(COLUMNS) - 1)]]
    keys = ("from_float32", "same_top1", "findings", "casts", "in_float32", "bytes_a_parameter", "seconds")
    return [
        [
            name,
            kind,
            tool,
            *(
                (found.get("error", "")[:40], *[None] * 6)
                if "error" in found
                else (len(found[key]) if key == "findings" else found[key] for key in keys)
            ),
        ]
        for kind in ("usual", "large")
        if kind in values
        for tool, found in values[kind].items()
    ]


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """How many hold, and in how many each is nearer to float32."""
    found: dict[str, Any] = {
        "failed": {name: values["error"] for name, values in rows.items() if "error" in values}
    }
    for kind in ("usual", "large"):
        both = [values[kind] for values in rows.values() if kind in values]
        held = [item for item in both if all(item[tool]["holds"] for tool in TOOLS)]
        found[kind] = {
            "networks": len(both),
            **{f"{tool} holds": sum(item[tool]["holds"] for item in both) for tool in TOOLS},
            **{f"{tool} in float32": sum(item[tool].get("in_float32", 0) for item in both) for tool in TOOLS},
            "cveff nearer": sum(
                item["cveff"]["from_float32"] <= item["autocast"]["from_float32"] for item in held
            ),
            "of": len(held),
            "median_ratio": float(
                np.median([item["cveff"]["from_float32"] / item["autocast"]["from_float32"] for item in held])
            )
            if held
            else None,
        }
    return found


if __name__ == "__main__":
    main()
