"""A model repository for NVIDIA Triton Inference Server, made from a bundle's chosen model file.

`tritonserver --model-repository my.bundle/triton` serves it. The settings repeat those that were measured.
Field meanings: the model configuration page of Triton's documentation and the READMEs of its two backends.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cveff.runtime.input_spec import InputSpec
from cveff.runtime.manifest import ModelFile, model_files

MAX_BATCH_SIZE = 32
"""Images Triton may join into one call of ONNX Runtime."""

MAX_QUEUE_DELAY_MICROSECONDS = 500
"""How long a request may wait for others to join its batch."""

_ON_GPU = {
    "onnxruntime-cuda": "",
    "onnxruntime-tensorrt": "optimization { execution_accelerators {"
    ' gpu_execution_accelerator [ { name: "tensorrt" } ] } }\n',
}
"""Engines that an instance on a GPU serves, and what its ONNX Runtime is told beyond that."""


def write_triton(folder: Path, manifest: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Write `folder/NAME/config.pbtxt`, `labels.txt` and `1/` with the model.

    Args:
        folder: the repository to make.
        manifest: as `write_bundle` takes it; `model.name`, `input`, `labels` and `engine` are read.
        files: the bundle's model files: path inside the bundle -> file. External data of an ONNX file keeps
            its name beside it.
    """
    chosen = served(manifest)
    name = model_name(manifest)
    version = folder / name / "1"
    version.mkdir(parents=True)
    source = Path(chosen.file)
    default = "model.xml" if source.suffix == ".xml" else "model.onnx"
    link_or_copy(files[chosen.file], version / default)
    if source.suffix == ".xml":
        link_or_copy(files[str(source.with_suffix(".bin"))], version / "model.bin")
    for extra in files:
        if extra.startswith(f"{chosen.file}.") or extra == f"{source.with_suffix('')}.data":
            link_or_copy(files[extra], version / Path(extra).name)
    labels = [re.sub(r"\s+", " ", label) for label in manifest["labels"]]  # a line each, whatever they hold
    (folder / name / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    (folder / name / "config.pbtxt").write_text(config(manifest, name, chosen), encoding="utf-8")


def served(manifest: Mapping[str, Any]) -> ModelFile:
    """The file Triton serves: the bundle's choice, or the first that its ONNX Runtime or OpenVINO backend opens."""
    files = model_files(manifest)
    return next((file for file in files if file.engine != "aot-inductor"), files[0])


def model_name(manifest: Mapping[str, Any]) -> str:
    """The model's name as Triton takes it in an address: letters, digits, `_`, `-` and `.`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", str(manifest["model"]["name"])).strip("._") or "model"


def config(manifest: Mapping[str, Any], name: str, chosen: ModelFile) -> str:
    """The text of `config.pbtxt`."""
    spec = InputSpec.from_json(manifest["input"])
    image = [*spec.size, spec.channels]
    classes = [len(manifest["labels"])]
    if chosen.engine.startswith("onnxruntime"):
        return _onnxruntime(name, image, classes, chosen)
    return _openvino(name, image, classes, chosen)


def link_or_copy(source: Path, destination: Path) -> None:
    """The same content under a second name: a hard link where the file system has them, else a copy."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _onnxruntime(name: str, image: list[int], classes: list[int], chosen: ModelFile) -> str:
    optimized = chosen.options.get("graph_optimizations", True)
    return (
        f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: {MAX_BATCH_SIZE}\n'
        + _tensors(image, classes)
        + "# Requests that arrive together run as one batch.\n"
        + f"dynamic_batching {{ max_queue_delay_microseconds: {MAX_QUEUE_DELAY_MICROSECONDS} }}\n"
        + _instance("KIND_GPU" if chosen.engine in _ON_GPU else "KIND_CPU")
        + _ON_GPU.get(chosen.engine, "")
        + ("" if optimized else "# 2: computed exactly as written, without graph optimisations.\n")
        + ("" if optimized else "optimization { graph { level: 2 } }\n")
        + _parameter("intra_op_thread_count", chosen.threads)
        + _parameter("inter_op_thread_count", 1)
    )


def _openvino(name: str, image: list[int], classes: list[int], chosen: ModelFile) -> str:
    precision = chosen.options.get("inference_precision", "f32")
    bf16 = _parameter("HINT_BF16", "YES") if precision == "bf16" else ""
    return (
        f'name: "{name}"\nbackend: "openvino"\n'
        + ("" if chosen.file.endswith(".xml") else 'default_model_filename: "model.onnx"\n')
        + "# 0: a request runs with the batch it brings. With a maximum, this backend pads every batch to it.\n"
        "max_batch_size: 0\n"
        + _tensors([-1, *image], [-1, *classes])
        + _instance()
        + "# The backend cannot ask for float32: where the processor has bfloat16, OpenVINO uses that.\n"
        + bf16
        + _parameter("PERFORMANCE_HINT", chosen.options.get("performance_hint", "latency").upper())
        + _parameter("NUM_STREAMS", chosen.options.get("streams", 1))
        + (_parameter("INFERENCE_NUM_THREADS", chosen.threads) if chosen.threads else "")
    )


def _tensors(image: list[int], logits: list[int]) -> str:
    return (
        "# uint8 images, height × width × channels; scaling and normalisation happen inside the model.\n"
        f'input [ {{ name: "images" data_type: TYPE_UINT8 dims: {image} }} ]\n'
        f'output [ {{ name: "logits" data_type: TYPE_FP32 dims: {logits} label_filename: "labels.txt" }} ]\n'
    )


def _instance(kind: str = "KIND_CPU") -> str:
    return f"instance_group [ {{ count: 1 kind: {kind} }} ]\n"


def _parameter(key: str, value: Any) -> str:
    return f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}\n'
