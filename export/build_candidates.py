"""From one exported float32 file to a file for each (engine, precision) of a target. Failures are recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cveff.errors import CveffError, EngineError, ExportError, MissingDependencyError
from cveff.export.candidates import Candidate
from cveff.measure.size import size_bytes
from cveff.progress import Progress
from cveff.runtime.engines import available_engines, open_file
from cveff.runtime.machine import isa
from cveff.runtime.session import Session
from cveff.target import Target

ONNX = "model.onnx"
_BF16_ISA = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Built:
    """Candidates in the target's order, and an open session for each that could be built and opened."""

    candidates: tuple[Candidate, ...]
    sessions: Mapping[str, Session]

    def close(self) -> None:
        """Close every session."""
        for session in self.sessions.values():
            session.close()


def build_candidates(
    source: Path, target: Target, calibration: np.ndarray | None, folder: Path, progress: Progress
) -> Built:
    """Build and open every candidate; one that fails is kept with its `error`.

    Args:
        source: the exported float32 file, `folder / "model.onnx"`.
        calibration: (N, H, W, C) uint8, needed for int8.
        folder: where files are written.
    """
    candidates: list[Candidate] = []
    sessions: dict[str, Session] = {}
    pairs = list(dict.fromkeys(target.candidates))
    for engine, precision in progress.track(pairs, "building candidates", len(pairs)):
        candidate = Candidate(engine, precision, threads=target.num_threads)
        try:
            path, options = _build(engine, precision, source, calibration, folder)
            candidate = replace(
                candidate, file=path.name, path=path, options=options, size_bytes=size_bytes(path)
            )
            sessions[candidate.name] = open_file(engine, path, threads=candidate.threads, options=options)
        except CveffError as error:
            candidate = replace(candidate, error=_reason(error))
            progress.message(f"{candidate.name}: {candidate.error}")
        candidates.append(candidate)
    return Built(tuple(candidates), sessions)


def model_files(candidate: Candidate, folder: Path) -> dict[str, Path]:
    """The files the candidate's engine opens: name in the bundle -> where it was built."""
    names = [candidate.file]
    if candidate.file.endswith(".xml"):
        names.append(candidate.file.removesuffix(".xml") + ".bin")
    return {name: folder / name for name in names}


def _build(
    engine: str, precision: str, source: Path, calibration: np.ndarray | None, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """The candidate's file (built unless it is there already) and the engine's options."""
    if engine not in available_engines():
        raise MissingDependencyError(f"{engine} is not installed; pip install {_requirement(engine)}")
    if engine == "onnxruntime":
        return _build_onnx(precision, source, calibration, folder), {}
    from cveff.export.openvino import Preset, convert, quantize_openvino

    is_bf16 = precision.endswith("bf16")
    if is_bf16 and not _BF16_ISA.intersection(isa()):
        raise EngineError("this processor has no bfloat16 arithmetic")
    stored = precision.removesuffix("-bf16")
    path = folder / (f"model.{stored}.xml" if stored.startswith("int8") else "model.xml")
    if not path.exists():
        if stored.startswith("int8"):
            # Zero points keep more of signed activations and cost time on some networks: both are built and timed.
            preset: Preset = "mixed" if stored == "int8-asymmetric" else "performance"
            quantize_openvino(
                _rounded(source, calibration, folder), path, _needed(calibration), preset=preset
            )
        else:
            convert(source, path)
    return path, {"inference_precision": "bf16" if is_bf16 else "f32"}


def _build_onnx(precision: str, source: Path, calibration: np.ndarray | None, folder: Path) -> Path:
    if precision == "fp32":
        return source
    if precision == "int8":
        from cveff.export.quantize import quantize_onnx

        # With the weights' error mostly gone, what clipping the rarest activations costs is worth their finer steps.
        return quantize_onnx(
            _rounded(source, calibration, folder),
            folder / "model.int8.onnx",
            _needed(calibration),
            method="percentile",
        )
    raise ExportError(f"ONNX Runtime's CPU engine does not compute in {precision}")


def _rounded(source: Path, calibration: np.ndarray | None, folder: Path) -> Path:
    """The float32 file with its weights on the int8 grid, made once: what every int8 candidate is quantized from."""
    from cveff.export.rounding import round_weights

    path = folder / "model.rounded.onnx"
    return path if path.exists() else round_weights(source, path, _needed(calibration))


def _needed(calibration: np.ndarray | None) -> np.ndarray:
    if calibration is None:
        raise ExportError("int8 needs calibration images")
    return calibration


def _requirement(engine: str) -> str:
    return "'cveff[openvino]'" if engine == "openvino" else engine


def _reason(error: CveffError) -> str:
    """The error on one line, without the temporary folder it happened in."""
    text = " ".join(str(error).split())
    text = re.sub(r"\S*/(model[\w.]*)", r"\1", text)
    return text if isinstance(error, MissingDependencyError) else f"could not be built: {text}"
