"""`deploy` for a model with early exits: its stages on the fastest engine of the target that runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cveff.dynamic.exits import with_exits
from cveff.dynamic.thresholds import Goal
from cveff.edits import edit_to_json
from cveff.errors import CveffError, StepError, TargetError
from cveff.export.build_candidates import ONNX
from cveff.export.deploy_checks import Images
from cveff.export.exits import export_stages
from cveff.export.scoring import REFERENCE, first_images, time_all
from cveff.export.staged import Parts
from cveff.export.write_staged import write_staged
from cveff.measure.predictor import Predictor, torch_predictor
from cveff.measure.threads import pinned_threads
from cveff.model import Model
from cveff.progress import Progress
from cveff.runtime.engines import available_engines, open_file
from cveff.runtime.manifest import ModelFile
from cveff.runtime.onnx_providers import PROVIDERS
from cveff.runtime.stages import Stage
from cveff.target import Target

RUNS_STAGES = ("onnxruntime", "openvino", *PROVIDERS)
"""Engines that open stage files; TensorRT and AOTInductor run whole networks only."""
ENGINE_SECONDS = 4.0


def deploy_exits(
    model: Model,
    images: Images,
    target: Target,
    goal: Goal,
    gate: str,
    *,
    name: str | None,
    out: Path,
    seed: int,
    recipe: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> Path:
    """Write the staged bundle of `model`; see `deploy`.

    Raises:
        StepError: no thresholds meet the goal.
        TargetError: no engine of the target runs stages in float32 here.
        ExportError: as `export_stages`.
    """
    network = with_exits(model.module, model.spec.architecture)
    with tempfile.TemporaryDirectory(prefix="cveff-exits-") as temporary:
        work = Path(temporary)
        progress.message(f"exporting {model.spec.architecture} in {len(network.names) + 1} stages")
        paths = export_stages(model, work, whole=ONNX)
        engine, notes = _fastest(work / ONNX, target, images, model, seed)
        names = (*network.names, "the end")
        stages = tuple(
            Stage(
                name=exit_name,
                file=_file(engine, path.name, target),
                size=model.spec.input.size,
                interpolation=model.spec.input.interpolation,
                goes_on=index > 0,
            )
            for index, (path, exit_name) in enumerate(zip(paths, names, strict=True))
        )
        parts = Parts(
            folder=work,
            stages=stages,
            full=_file(engine, ONNX, target),
            files=(ONNX, *(path.name for path in paths)),
            input=model.spec.input,
            labels=images.labels,
            description={
                "name": name or model.spec.architecture,
                "architecture": model.spec.architecture,
                "parameters": model.num_parameters,
                "edits": [edit_to_json(edit) for edit in model.spec.edits],
            },
            full_name="the whole network",
            reference=(REFERENCE, torch_predictor(model, target.num_threads)),
        )
        return write_staged(
            parts,
            images.selection,
            images.evaluation,
            goal=goal,
            gate=gate,
            threads=target.num_threads,
            batch_sizes=target.batch_sizes,
            seed=seed,
            out=out,
            extra={
                "recipe": dict(recipe),
                "instructions": list(target.instruction_sets),
                "target": target.to_json(),
                **({"steps": [dict(step) for step in steps]} if steps else {}),
            },
            warnings=(*images.warnings, *notes),
            progress=progress,
            memory_mb=target.memory_mb,
        )


def _file(engine: str, name: str, target: Target) -> ModelFile:
    options = {"inference_precision": "f32"} if engine == "openvino" else {}
    return ModelFile(engine, name, target.num_threads, options, "fp32")


def _fastest(
    path: Path, target: Target, images: Images, model: Model, seed: int
) -> tuple[str, tuple[str, ...]]:
    """The engine on which the whole network is fastest, and why others were left out."""
    notes, opened = [], {}
    batch = first_images(images.selection, model.spec.input, 1)
    with pinned_threads(target.num_threads):
        for engine in dict.fromkeys(
            engine for engine, precision in target.candidates if precision == "fp32" and engine in RUNS_STAGES
        ):
            if engine not in available_engines():
                notes.append(f"{engine} is not installed here, so stages were not tried on it.")
                continue
            try:
                opened[engine] = open_file(
                    engine, path, threads=target.num_threads, options=_file(engine, ONNX, target).options
                )
            except CveffError as error:
                notes.append(f"{engine} cannot open the network: {error}")
        if not opened:
            raise TargetError(
                f"target {target.name} has no fp32 candidate among {', '.join(RUNS_STAGES)} that runs here, and stages "
                "run on no other; add onnxruntime fp32 to it"
            )
        predictors: dict[str, Predictor] = dict(opened)
        first = target.batch_sizes[0]
        try:
            found = time_all(predictors, batch, first, budget_seconds=ENGINE_SECONDS, seed=seed)
        finally:
            for session in opened.values():
                session.close()
    return min(found, key=lambda engine: found[engine].median_ms), tuple(notes)


def check_goal(goal: Goal | None, gate: str | None, has_exits: bool) -> tuple[Goal, str]:
    """The goal and gate of a model with exits, with their defaults.

    Raises:
        StepError: they were given for a model without exits.
    """
    if not has_exits and (goal is not None or gate is not None):
        raise StepError(
            "exits and gate are for models with early exits, and this one has none; apply EarlyExit or GlanceFocus "
            "first"
        )
    return goal or Goal(accuracy_drop=0.5), gate or "confidence"
