"""From one exported float32 file to a file for each (engine, precision) of a target. Failures are recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cveff.errors import CveffError, EngineError, ExportError, MissingDependencyError
from cveff.export.candidates import Candidate
from cveff.export.clipping import Clipping
from cveff.export.int8 import Int8, NotWorthwhileError
from cveff.measure.size import size_bytes
from cveff.progress import Progress
from cveff.runtime.engines import available_engines, open_file
from cveff.runtime.machine import isa
from cveff.runtime.onnx_providers import PROVIDERS
from cveff.runtime.session import Session
from cveff.target import Target

ONNX = "model.onnx"
_BF16_ISA = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Built:
    """Candidates in the target's order, and an open session for each that could be built and opened.

    Attributes:
        stand_ins: of files that are prepared for another device, ONNX Runtime's sessions where it opens them.
    """

    candidates: tuple[Candidate, ...]
    sessions: Mapping[str, Session]
    stand_ins: Mapping[str, Session] = field(default_factory=dict)

    def close(self) -> None:
        """Close every session."""
        for session in (*self.sessions.values(), *self.stand_ins.values()):
            session.close()


def build_candidates(source: Path, target: Target, int8: Int8, folder: Path, progress: Progress) -> Built:
    """Build and open every candidate; one that fails is kept with its `error`.

    Args:
        source: the exported file, `folder / "model.onnx"`.
        int8: the same model's files in integers.
        folder: where files are written.
    """
    candidates: list[Candidate] = []
    sessions: dict[str, Session] = {}
    stand_ins: dict[str, Session] = {}
    pairs = list(dict.fromkeys(target.candidates))
    for engine, precision in progress.track(pairs, "building candidates", len(pairs)):
        candidate = Candidate(engine, precision, threads=target.num_threads)
        try:
            path, options = _build(engine, precision, source, int8, target, folder)
            candidate = replace(
                candidate,
                file=path.name,
                path=path,
                options=options,
                size_bytes=size_bytes(path) + _plan_bytes(engine, path),
                rounding=int8.described(path),
                saturation=_clipping(engine, precision, path, int8),
            )
            session = open_file(engine, path, threads=candidate.threads, options=options)
            sessions[candidate.name] = session
            for note in session.notes:
                progress.message(f"{candidate.name}: {note}")
        except CveffError as error:
            candidate = replace(candidate, error=_reason(error))
            if engine == "tensorrt" and isinstance(error, MissingDependencyError):
                candidate, stand_in = _prepared(candidate, source, int8, target)
                stand_ins |= {candidate.name: stand_in} if stand_in is not None else {}
            progress.message(f"{candidate.name}: {candidate.error}")
        candidates.append(candidate)
    return Built(tuple(candidates), sessions, stand_ins)


def model_files(candidate: Candidate, folder: Path) -> dict[str, Path]:
    """The files the candidate's engine opens: name in the bundle -> where it was built."""
    names = [candidate.file]
    if candidate.file.endswith(".xml"):
        names.append(candidate.file.removesuffix(".xml") + ".bin")
    if candidate.engine == "tensorrt" and not candidate.is_prepared:
        plan = Path(candidate.file).with_suffix(".plan").name
        names += [plan, f"{plan}.json"]
    return {name: folder / name for name in names}


def _build(
    engine: str, precision: str, source: Path, int8: Int8, target: Target, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """The candidate's file (built unless it is there already) and the engine's options."""
    if engine not in available_engines():
        raise MissingDependencyError(f"{engine} is not installed; pip install {_requirement(engine)}")
    if engine.startswith("onnxruntime"):
        return _build_onnx(engine, precision, source, int8, target), _types_allowed(engine, precision)
    if engine == "tensorrt":
        from cveff.export.tensorrt_candidate import build_candidate

        _check_given(int8, precision)
        return build_candidate(precision, source, int8, target.tensorrt)
    if engine == "aot-inductor":
        return _build_aot(precision, int8, target, folder), {}
    from cveff.export.openvino import Preset, convert, quantize_openvino
    from cveff.export.openvino_streams import with_streams

    is_bf16 = precision.endswith("bf16")
    if is_bf16:
        _require_bfloat16(target)
    stored = precision.removesuffix("-bf16")
    _check_given(int8, stored)
    path = folder / (f"model.{stored}.xml" if stored.startswith("int8") else "model.xml")
    if not path.exists():
        if stored.startswith("int8") and not int8.is_given:
            # Zero points keep more of signed activations and cost time on some networks: both are built and timed.
            preset: Preset = "mixed" if stored == "int8-asymmetric" else "performance"
            quantize_openvino(
                int8.rounded_weights(), path, int8.usual_images(), preset=preset, half_range=int8.clips
            )
        else:
            convert(source, path)
    return path, with_streams(path, {"inference_precision": "bf16" if is_bf16 else "f32"}, target)


def _prepared(
    candidate: Candidate, source: Path, int8: Int8, target: Target
) -> tuple[Candidate, Session | None]:
    """A candidate that cannot run here, with the file that a device with TensorRT builds its plan from."""
    from cveff.export.tensorrt_candidate import prepare_candidate

    try:
        _check_given(int8, candidate.precision)
        path, options = prepare_candidate(candidate.precision, source, int8, target.tensorrt)
    except CveffError as error:
        return replace(candidate, error=f"{candidate.error}; its file {_reason(error)}"), None
    candidate = replace(
        candidate,
        file=path.name,
        path=path,
        options=options,
        size_bytes=size_bytes(path),
        is_prepared=True,
        error=f"{candidate.error}. {path.name} ships all the same: run.py --engine tensorrt:{candidate.precision} "
        "builds it on the device",
    )
    try:
        return candidate, open_file("onnxruntime", path, threads=candidate.threads)
    except EngineError:  # it has no kernels for bfloat16, nor before 1.32 for float8
        return candidate, None


def _build_onnx(engine: str, precision: str, source: Path, int8: Int8, target: Target) -> Path:
    _check_given(int8, precision)
    if precision == "fp32" or int8.is_given:
        return source
    if precision == "fp16" or engine == "onnxruntime-tensorrt":
        return int8.tensorrt(precision)
    return int8.mixed(target) if precision == "int8-mixed" else int8.onnx()


def _types_allowed(engine: str, precision: str) -> dict[str, Any]:
    """Releases of TensorRT before 11 compute in a file's 16- and 8-bit types only where that is switched on."""
    allowed = {"fp16": ("fp16",), "int8": ("fp16", "int8")}.get(precision, ())
    return {f"trt_{kind}_enable": True for kind in allowed} if engine == "onnxruntime-tensorrt" else {}


def _plan_bytes(engine: str, path: Path) -> int:
    return size_bytes(path.with_suffix(".plan")) if engine == "tensorrt" else 0


def _build_aot(precision: str, int8: Int8, target: Target, folder: Path) -> Path:
    _check_given(int8, precision)
    kind: Literal["fp32", "bf16"] = "bf16" if precision == "bf16" else "fp32"
    if kind == "bf16":
        _require_bfloat16(target)
    if set(target.instruction_sets) != set(isa()):
        raise ExportError(
            f"AOTInductor compiles for the processor it runs on, and target {target.name} names another's "
            "instructions; deploy on the device"
        )
    from cveff.export.aot_inductor import compile_package

    path = folder / f"model.{precision}.pt2"
    return path if path.exists() else compile_package(int8.model, path, precision=kind)


def _require_bfloat16(target: Target) -> None:
    if not _BF16_ISA.intersection(isa()):
        raise EngineError("this processor has no bfloat16 arithmetic")
    if not _BF16_ISA.intersection(target.instruction_sets):
        raise EngineError(
            f"target {target.name} has no bfloat16 arithmetic: its instructions are "
            f"{', '.join(target.instruction_sets) or 'none'}"
        )


def _clipping(engine: str, precision: str, path: Path, int8: Int8) -> Clipping | None:
    """What was done against sums that clip; None for floats, and where the target does not clip."""
    if not int8.clips or not precision.startswith("int8") or engine == "tensorrt":
        return None
    if engine == "openvino" and not int8.is_given:
        return Clipping("half_range")
    return int8.clipping(path)


def _check_given(int8: Int8, precision: str) -> None:
    if int8.is_given and precision != "int8":
        raise ExportError(
            f"the model is quantized already: there is no {precision} file of it but the one it says"
        )


def _requirement(engine: str) -> str:
    if engine in PROVIDERS:
        return f"{PROVIDERS[engine].wheel} in place of the onnxruntime that is here"
    extras = {name: f"'cveff[{name}]'" for name in ("openvino", "tensorrt")}
    return {**extras, "aot-inductor": "torch"}.get(engine, engine)


def _reason(error: CveffError) -> str:
    """The error on one line, without the temporary folder it happened in."""
    text = " ".join(str(error).split())
    text = re.sub(r"\S*/(model[\w.]*)", r"\1", text)
    return (
        text
        if isinstance(error, (MissingDependencyError, NotWorthwhileError))
        else f"could not be built: {text}"
    )
