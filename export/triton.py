"""A model repository for NVIDIA Triton Inference Server, made from a bundle's chosen model file.

`tritonserver --model-repository my.bundle/triton` serves it. The settings repeat those that were measured.
Field meanings: the model configuration page of Triton's documentation and the READMEs of its three backends.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cveff.runtime.input_spec import InputSpec
from cveff.runtime.manifest import ModelFile, model_files

MAX_BATCH_SIZE = 32
"""Images Triton may join into one call of ONNX Runtime."""

MAX_QUEUE_DELAY_MICROSECONDS = 500
"""How long a request may wait for others to join its batch."""

SERVED = ("onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "openvino", "tensorrt")
"""Engines that Triton has a backend for."""


def write_triton(folder: Path, manifest: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Write `folder/NAME/config.pbtxt`, `labels.txt` and `1/` with the model.

    Nothing is written where no file's engine is `SERVED`; a plan without weights is not, as Triton cannot put them in.

    Args:
        folder: the repository to make.
        manifest: as `write_bundle` takes it; `model.name`, `input`, `labels`, `engine` and `target` are read.
        files: the bundle's model files: path inside the bundle -> file. External data of an ONNX file keeps
            its name beside it.
    """
    chosen = served(manifest)
    if chosen is None:
        return
    name = model_name(manifest)
    version = folder / name / "1"
    version.mkdir(parents=True)
    source = Path(chosen.file)
    if chosen.engine == "tensorrt":  # the plan beside the ONNX file that other devices build theirs from
        source = source.with_suffix(".plan")
    link_or_copy(files[str(source)], version / f"model{source.suffix}")  # each backend's own default name
    if source.suffix == ".xml":
        link_or_copy(files[str(source.with_suffix(".bin"))], version / "model.bin")
    for extra in files:
        if extra.startswith(f"{chosen.file}.") or extra == f"{source.with_suffix('')}.data":
            link_or_copy(files[extra], version / Path(extra).name)
    labels = [re.sub(r"\s+", " ", label) for label in manifest["labels"]]  # a line each, whatever they hold
    (folder / name / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    (folder / name / "config.pbtxt").write_text(config(manifest, name, chosen), encoding="utf-8")


def served(manifest: Mapping[str, Any]) -> ModelFile | None:
    """The file Triton serves: the bundle's choice, or the first that one of its backends opens."""
    stripped = _settings(manifest).get("strip_weights", False)
    files = (file for file in model_files(manifest) if file.engine in SERVED)
    return next((file for file in files if not (file.engine == "tensorrt" and stripped)), None)


def model_name(manifest: Mapping[str, Any]) -> str:
    """The model's name as Triton takes it in an address: letters, digits, `_`, `-` and `.`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", str(manifest["model"]["name"])).strip("._") or "model"


def config(manifest: Mapping[str, Any], name: str, chosen: ModelFile) -> str:
    """The text of `config.pbtxt`, for an engine of `SERVED`."""
    spec = InputSpec.from_json(manifest["input"])
    image = [*spec.size, spec.channels]
    classes = [len(manifest["labels"])]
    settings = _settings(manifest)
    if chosen.engine == "openvino":
        return _openvino(name, image, classes, chosen)
    if chosen.engine == "tensorrt":
        return _tensorrt(name, image, classes, settings)
    return _onnxruntime(name, image, classes, chosen, settings)


def _settings(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """`[tensorrt]` of the target the bundle was made for; nothing in older bundles."""
    settings: Mapping[str, Any] = manifest.get("target", {}).get("tensorrt", {})
    return settings


def link_or_copy(source: Path, destination: Path) -> None:
    """The same content under a second name: a hard link where the file system has them, else a copy."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _onnxruntime(
    name: str, image: list[int], classes: list[int], chosen: ModelFile, settings: Mapping[str, Any]
) -> str:
    is_on_gpu = chosen.engine != "onnxruntime"
    optimized = chosen.options.get("graph_optimizations", True)
    return (
        f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: {MAX_BATCH_SIZE}\n'
        + _tensors(image, classes)
        + _batching()
        + _instance("KIND_GPU" if is_on_gpu else "KIND_CPU")
        + _optimization(optimized, chosen.engine == "onnxruntime-tensorrt", settings)
        + (_warmup(image, (1, MAX_BATCH_SIZE)) if is_on_gpu else "")
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
        + _instance("KIND_CPU")
        + "# The backend cannot ask for float32: where the processor has bfloat16, OpenVINO uses that.\n"
        + bf16
        + _parameter("PERFORMANCE_HINT", chosen.options.get("performance_hint", "latency").upper())
        + _parameter("NUM_STREAMS", chosen.options.get("streams", 1))
        + (_parameter("INFERENCE_NUM_THREADS", chosen.threads) if chosen.threads else "")
    )


def _tensorrt(name: str, image: list[int], classes: list[int], settings: Mapping[str, Any]) -> str:
    """A plan takes the batches of its optimization profile; without a record of them, single images."""
    least, usual, most = settings.get("batches", (1, 1, 1))
    return (
        f'name: "{name}"\nplatform: "tensorrt_plan"\nbackend: "tensorrt"\n'
        + "# A plan runs on the GPU and with the TensorRT it was built for: Triton's has to be that release.\n"
        + (
            "# Of an older one, start tritonserver with --backend-config=tensorrt,version-compatible=true\n"
            if settings.get("version_compatible")
            else ""
        )
        + (f"# It takes {least} images or more: clients have to bring as many.\n" if least > 1 else "")
        + f"max_batch_size: {most}\n"
        + _tensors(image, classes)
        + _batching(sorted({usual, most} - {1}))
        + _instance("KIND_GPU")
        + _warmup(image, (least, usual, most))
    )


def _tensors(image: list[int], logits: list[int]) -> str:
    return (
        "# uint8 images, height × width × channels; scaling and normalisation happen inside the model.\n"
        f'input [ {{ name: "images" data_type: TYPE_UINT8 dims: {image} }} ]\n'
        f'output [ {{ name: "logits" data_type: TYPE_FP32 dims: {logits} label_filename: "labels.txt" }} ]\n'
    )


def _batching(preferred: Sequence[int] = ()) -> str:
    sizes = f"preferred_batch_size: {list(preferred)} " if preferred else ""
    return (
        "# Requests that arrive together run as one batch.\n"
        f"dynamic_batching {{ {sizes}max_queue_delay_microseconds: {MAX_QUEUE_DELAY_MICROSECONDS} }}\n"
    )


def _instance(kind: str) -> str:
    return f"instance_group [ {{ count: 1 kind: {kind} }} ]\n"


def _optimization(graphs: bool, tensorrt: bool, settings: Mapping[str, Any]) -> str:
    """ONNX Runtime's graph optimisations, and whether it hands what it can to TensorRT, in the types of the file."""
    parts = []
    if not graphs:
        parts.append("graph { level: 2 }")  # computed exactly as written
    if tensorrt:
        workspace = settings.get("workspace_mb", 0)
        limit = (
            f' parameters {{ key: "max_workspace_size_bytes" value: "{workspace << 20}" }}'
            if workspace
            else ""
        )
        parts.append(
            f'execution_accelerators {{ gpu_execution_accelerator : [ {{ name: "tensorrt"{limit} }} ] }}'
        )
    return f"optimization {{ {' '.join(parts)} }}\n" if parts else ""


def _warmup(image: list[int], batches: Sequence[int]) -> str:
    """A call of each size before the model is ready, so that no client waits for the GPU's first one."""
    calls = ", ".join(
        f'{{ name: "batch {size}" batch_size: {size} inputs {{ key: "images" value: '
        f"{{ data_type: TYPE_UINT8 dims: {image} zero_data: true }} }} }}"
        for size in dict.fromkeys(batches)
    )
    return f"model_warmup [ {calls} ]\n"


def _parameter(key: str, value: Any) -> str:
    return f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}\n'
