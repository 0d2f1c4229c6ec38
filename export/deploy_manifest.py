"""The manifest of a deployment, from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cveff.edits import edit_to_json
from cveff.export.build_candidates import ONNX
from cveff.export.candidates import Candidate, finite, latency_json
from cveff.export.deploy_checks import Images
from cveff.export.measure_candidates import Measured
from cveff.export.scoring import REFERENCE
from cveff.model import Model
from cveff.runtime.engines import opens
from cveff.runtime.machine import describe
from cveff.target import Target

PACKAGES = (
    "cveff",
    "torch",
    "timm",
    "numpy",
    "pillow",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "tensorrt",
    "cuda-bindings",
)
"""Whose versions a manifest holds."""


def deployment_manifest(
    name: str | None,
    model: Model,
    images: Images,
    target: Target,
    max_accuracy_drop: float,
    measured: Measured,
) -> dict[str, Any]:
    """Every key but `schema_version`, `files` and `recipe`.

    Args:
        name: the model's name; by default its architecture.
        model: what was exported, its branches merged.
    """
    chosen, evaluation = measured.chosen, measured.evaluation
    first = target.batch_sizes[0]
    latencies = [
        {**latency_json(timing), "reference_median": measured.timings[batch].median_ms}
        for batch, timing in chosen.timings.items()
    ]
    deciding = next(item for item in latencies if item["batch"] == first)
    return {
        "model": {
            "name": name or model.spec.architecture,
            "architecture": model.spec.architecture,
            "parameters": model.num_parameters,
            "edits": [edit_to_json(edit) for edit in model.spec.edits],
        },
        "task": model.spec.task,
        "input": model.spec.input.to_json(),
        "labels": list(images.labels),
        "engine": _engine_entry(chosen),
        "alternatives": _alternatives(measured.candidates, target.num_threads),
        "instructions": list(target.instruction_sets),
        "target": target.to_json(),
        "metrics": {
            "accuracy": {
                "reference": evaluation.accuracy(REFERENCE),
                "deployed": evaluation.accuracy(chosen.name),
            },
            "agreement": evaluation.agreement(chosen.name, REFERENCE),
            "parity": {
                "max_relative_difference": finite(evaluation.relative_difference(chosen.name, REFERENCE))
            },
            "latency_ms": {
                key: deciding[key] for key in ("batch", "threads", "median", "p90", "reference_median")
            },
            "latencies": latencies,
            "peak_rss_bytes": chosen.peak_rss_bytes,
            "memory": measured.memory.to_json(),
            "size_bytes": chosen.size_bytes,
            "meaning_gap": chosen.meaning_gap,
            "images": {"split": images.evaluation.name, "count": len(images.evaluation)},
            "selection": {
                "split": images.selection.name,
                "count": len(images.selection),
                "reference_accuracy": measured.selection.accuracy(REFERENCE),
                "max_accuracy_drop": max_accuracy_drop,
            },
        },
        "candidates": [candidate.to_json(first) for candidate in measured.candidates],
        "versions": installed_versions(PACKAGES),
        "machine": describe(),
    }


def _engine_entry(candidate: Candidate, file: str = "") -> dict[str, Any]:
    return {
        "name": candidate.engine,
        "precision": candidate.precision,
        "file": file or candidate.file,
        "threads": candidate.threads,
        "options": dict(candidate.options),
        **({} if candidate.saturation is None else {"saturation": candidate.saturation.to_json()}),
    }


def _alternatives(candidates: Sequence[Candidate], threads: int) -> list[dict[str, Any]]:
    """Other ways to run the bundle: `model.onnx` on ONNX Runtime, and on every engine that opened it in float32; and
    files that were prepared for a device with TensorRT."""
    built = (c for c in candidates if c.engine == "onnxruntime" and c.file == ONNX and not c.error)
    # Of a model that came in quantized, `model.onnx` is the int8 file.
    entries = {"onnxruntime": next(built, Candidate("onnxruntime", "fp32", threads=threads))}
    entries |= {
        c.engine: c for c in candidates if c.precision == "fp32" and not c.error and opens(c.engine, ONNX)
    }
    return [
        *(_engine_entry(candidate, ONNX) for candidate in entries.values() if not candidate.chosen),
        *(_engine_entry(candidate) for candidate in candidates if candidate.is_prepared),
    ]


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
