"""Opening anything that can be measured: a `Model`, a module, a saved model, an ONNX file, an IR, a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cveff.errors import CveffError, EngineError
from cveff.export.task_predictor import FileDetector, torch_detector
from cveff.measure.predictor import Predictor, module_predictor
from cveff.measure.size import module_bytes, size_bytes
from cveff.model import Model, load
from cveff.runtime.aot_session import read_package
from cveff.runtime.cascade import Cascade
from cveff.runtime.detections import Suppression
from cveff.runtime.engines import ENGINES, open_file
from cveff.runtime.errors import InputSizeError
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.machine import usable_cores
from cveff.runtime.manifest import FILE_NAME, ModelFile, locate, model_files, read_manifest, verify_files
from cveff.runtime.session import Session
from cveff.runtime.stages import read_stages

_ENGINES = {".onnx": "onnxruntime", ".xml": "openvino", ".plan": "tensorrt", ".pt2": "aot-inductor"}
"""What opens a file where nothing else is asked for."""

Source = Model | tuple[nn.Module, InputSpec] | str | Path


@dataclass
class Subject:
    """Something open that answers batches.

    Attributes:
        name: what tables call it.
        kind: "module", "onnx", "openvino", "tensorrt", "aot-inductor" or "bundle".
        engine: "torch", or one of `cveff.runtime.engines.ENGINES`; `options` are the engine's.
        precision: of a bundle's file; "" where unknown.
        predictor: uint8 NHWC -> logits; of a detector, detections (`cveff.export.task_predictor`).
        spec: what it takes; None for a file that does not say.
        labels: one name a class; empty where unknown.
        size_bytes: of its files, or of a module's weights.
        path: the file its engine opened (of a staged bundle, the whole network's), None for a module; `folder`: the
            bundle's folder.
        model: the PyTorch model, where there is one.
        manifest: the bundle's; `file` is its entry that is measured.
        task: "classification", "detection" or "segmentation".
    """

    name: str
    kind: str
    engine: str
    predictor: Predictor
    threads: int
    size_bytes: int
    spec: InputSpec | None = None
    labels: tuple[str, ...] = ()
    precision: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    folder: Path | None = None
    model: Model | None = None
    manifest: Mapping[str, Any] | None = None
    file: ModelFile | None = None
    task: str = "classification"

    @property
    def cascade(self) -> Cascade | None:
        """What runs a staged bundle, whose time depends on the images; None for everything else."""
        return self.predictor if isinstance(self.predictor, Cascade) else None

    @property
    def input(self) -> InputSpec:
        """`spec`, required.

        Raises:
            CveffError: the file does not say how it wants its images.
        """
        if self.spec is None:
            raise CveffError(
                f"{self.name} does not say which images it takes (no cveff metadata), so data cannot be "
                "prepared for it; measure a file written by cveff.export, or a bundle"
            )
        return self.spec

    def example(self, batch: int, seed: int = 0) -> np.ndarray:
        """A batch of random pixels of the right size, (batch, H, W, C) uint8.

        Raises:
            InputSizeError: the file leaves its image size open.
        """
        size, channels = (
            (self.spec.size, self.spec.channels)
            if self.spec is not None
            else (getattr(self.predictor, "size", None), getattr(self.predictor, "channels", None))
        )
        if size is None or channels is None:
            raise InputSizeError(f"{self.name} leaves its image size open; give a file with a fixed one")
        return np.random.default_rng(seed).integers(0, 256, (batch, *size, channels), dtype=np.uint8)

    def close(self) -> None:
        """Free the engine's memory."""
        close = getattr(self.predictor, "close", None)
        if close is not None:
            close()


def open_subject(source: Source, *, threads: int | None = None, name: str | None = None) -> Subject:
    """Open `source` for measuring.

    Args:
        source: a `Model`; (module, its `InputSpec`); a folder written by `cveff.save`; a `.onnx`, `.xml`, `.plan` or
            `.pt2` file; a bundle. "openvino:FILE", "onnxruntime-cuda:FILE", … choose the engine of a file or a bundle.
        threads: of the engine; by default every core this process may use.
        name: what to call it.

    Raises:
        CveffError: nothing that can be opened; the message says what was found. A bundle's hashes are checked.
    """
    threads = threads or usable_cores()
    if isinstance(source, Model):
        return _module(source.module, source.spec.input, threads, name or source.spec.architecture, source)
    if isinstance(source, tuple):
        module, spec = source
        return _module(module, spec, threads, name or type(module).__name__)
    if isinstance(source, nn.Module):
        raise CveffError(
            "a bare module does not say which images it takes; give (module, cveff.InputSpec(size=…)) or a Model"
        )
    engine, path = _engine_and_path(source)
    name = name or (f"{engine}:{path.name}" if engine else path.name)
    if (path / FILE_NAME).is_file():
        return _bundle(path, engine, threads, name)
    if (path / "model.json").is_file():
        if engine:
            raise CveffError(
                f"{path} is a saved PyTorch model; {engine} opens exported files, export it first"
            )
        model = load(path)
        return _module(model.module, model.spec.input, threads, name, model)
    if path.suffix in _ENGINES and path.is_file():
        return _file(path, engine or _ENGINES[path.suffix], threads, name)
    if not path.exists():
        raise CveffError(
            f"{path} does not exist; give a saved model, a .onnx, .xml or .pt2 file, or a bundle"
        )
    raise CveffError(
        f"{path} is no saved model, .onnx, .xml or .pt2 file, or bundle; cveff cannot measure it"
    )


def _module(
    module: nn.Module, spec: InputSpec, threads: int, name: str, model: Model | None = None
) -> Subject:
    task = "classification" if model is None else model.spec.task
    return Subject(
        name=name,
        kind="module",
        engine="torch",
        predictor=(
            module_predictor(module, spec, threads)
            if model is None or task != "detection"
            else torch_detector(model, threads)
        ),
        threads=threads,
        size_bytes=module_bytes(module),
        spec=spec,
        task=task,
        labels=() if model is None else model.spec.labels,
        model=model,
    )


def _file(path: Path, engine: str, threads: int, name: str) -> Subject:
    options = {"inference_precision": "f32"} if engine == "openvino" else {}
    session = open_file(engine, path, threads=threads, options=options)
    values = _metadata(path)
    task = values.get("task", "classification")
    return Subject(
        name=name,
        kind="onnx" if path.suffix == ".onnx" else _ENGINES[path.suffix],
        engine=engine,
        task=task,
        predictor=_predictor(session, task, values),
        threads=threads,
        size_bytes=size_bytes(path),
        spec=InputSpec.from_json(values["input"]) if "input" in values else None,
        labels=tuple(values.get("labels", ())),
        options=options,
        path=path,
    )


def _bundle(folder: Path, engine: str, threads: int, name: str) -> Subject:
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    files = model_files(manifest)
    stages = read_stages(manifest, str(folder / FILE_NAME))
    if stages is not None:
        spec, labels = InputSpec.from_json(manifest["input"]), tuple(manifest["labels"])
        cascade = Cascade(folder, stages, spec, labels, engine=engine or None, threads=threads)
        whole = files[0]
        return Subject(
            name=name,
            kind="bundle",
            engine=cascade.engine if engine else whole.engine,
            precision=whole.precision,
            predictor=cascade,
            threads=threads,
            size_bytes=sum(
                size_bytes(locate(folder, file)) for file in {s.file.file for s in cascade.stages}
            ),
            spec=spec,
            labels=labels,
            options=whole.options,
            path=locate(folder, whole.file),
            folder=folder,
            manifest=manifest,
            file=whole,
        )
    chosen = next((file for file in files if engine in ("", file.engine)), None)
    if chosen is None:
        raise EngineError(
            f"{folder} ships no file for {engine}; it has {', '.join(sorted({file.engine for file in files}))}"
        )
    path = locate(folder, chosen.file)
    session = open_file(chosen.engine, path, threads=threads, options=chosen.options)
    return Subject(
        name=name,
        kind="bundle",
        engine=chosen.engine,
        precision=chosen.precision,
        task=manifest["task"],
        predictor=_predictor(session, manifest["task"], manifest),
        threads=threads,
        size_bytes=size_bytes(path),
        spec=InputSpec.from_json(manifest["input"]),
        labels=tuple(manifest["labels"]),
        options=chosen.options,
        path=path,
        folder=folder,
        manifest=manifest,
        file=chosen,
    )


def _predictor(session: Session, task: str, values: Mapping[str, Any]) -> Predictor:
    """What is measured of a file: with suppression, where the file leaves it to the runtime."""
    if task != "detection":
        return session
    return FileDetector(session, Suppression.from_json(values.get("suppression")))


def _metadata(path: Path) -> dict[str, Any]:
    """What a file says of itself; an IR keeps the ONNX file's metadata only where OpenVINO carried it over."""
    if path.suffix == ".plan":
        path = path.with_suffix(".onnx")
        if not path.is_file():
            return {}
    if path.suffix == ".onnx":
        import onnx

        from cveff.export.metadata import read_metadata

        return read_metadata(onnx.load(path, load_external_data=False))
    if path.suffix == ".pt2":
        return read_package(path)
    from xml.etree import ElementTree

    values = ElementTree.parse(path).getroot().find("rt_info/framework")
    found = {} if values is None else {item.tag: item.get("value", "") for item in values}
    texts = {"task": found["task"]} if "task" in found else {}
    return texts | {key: json.loads(found[key]) for key in ("input", "labels", "suppression") if key in found}


def _engine_and_path(source: str | Path) -> tuple[str, Path]:
    engine, colon, rest = str(source).partition(":")
    return (engine, Path(rest)) if colon and engine in ENGINES else ("", Path(source))
