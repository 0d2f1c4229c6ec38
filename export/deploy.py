"""`deploy`: build every candidate of a target, measure each on the engine that would run it, ship the best.

Nothing is claimed that was not measured on the exported file. Candidates are compared on the validation
images; the figures a user reads come from the test images where there are any, so that choosing does not
flatter them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cveff.compress.quant.network import is_cast
from cveff.data.dataset import Data, OnBadImage
from cveff.dynamic.exits import NetworkWithExits
from cveff.dynamic.thresholds import Goal
from cveff.errors import StepError
from cveff.export.build_candidates import ONNX, model_files
from cveff.export.bundle import write_bundle
from cveff.export.deploy_checks import check_out, check_settings, gather_images
from cveff.export.deploy_exits import check_goal, deploy_exits
from cveff.export.deploy_manifest import deployment_manifest
from cveff.export.evidence import collect_evidence
from cveff.export.int8 import Int8
from cveff.export.measure_candidates import measure
from cveff.export.onnx import export
from cveff.export.report import render
from cveff.model import Model, load
from cveff.progress import Progress, Silent
from cveff.runtime.machine import saturates
from cveff.runtime.manifest import read_manifest
from cveff.target import Target, load_target


@dataclass(frozen=True)
class Deployment:
    """What `deploy` made.

    Attributes:
        path: the bundle.
        manifest: its manifest; `metrics` and `candidates` hold every figure.
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def chosen(self) -> Mapping[str, Any]:
        """The candidate that shipped."""
        return next(entry for entry in self.manifest["candidates"] if entry["chosen"])

    def to_json(self) -> dict[str, Any]:
        """Path and manifest as plain JSON values."""
        return {"path": str(self.path), "manifest": dict(self.manifest)}


def deploy(
    model: Model | str | Path,
    *,
    data: Data | str | Path | None = None,
    calibration: str | Path | None = None,
    target: str | Path | Target = "edge-cpu",
    max_accuracy_drop: float = 1.0,
    out: str | Path,
    seed: int = 0,
    num_calibration: int = 256,
    on_bad_image: OnBadImage = "error",
    recipe: Mapping[str, Any] | None = None,
    steps: Sequence[Mapping[str, Any]] = (),
    name: str | None = None,
    exits: Goal | None = None,
    gate: str | None = None,
    progress: Progress | None = None,
) -> Deployment:
    """Make a bundle of the fastest candidate that keeps the model's accuracy.

    Args:
        model: a `Model`, or a folder written by `cveff.save`; left as it was.
        data: a `Data`, or what `cveff.data.load` reads. Candidates are compared on `val`, the reported
            figures come from `test` where there is one; int8 is calibrated on `train`.
        calibration: a folder of images without labels, used in place of `train`. Without `data`, one half of
            it calibrates and agreement with the original is measured on the other half.
        target: a profile's name, its file, or a `Target`.
        max_accuracy_drop: points of top-1 accuracy a candidate may lose against the original PyTorch module;
            without labels, points of top-1 disagreement with it.
        out: the bundle's folder; an existing bundle is replaced, anything else is refused.
        seed: of the calibration images and of the order of timing.
        num_calibration: images that int8 ranges are made from.
        on_bad_image: "error" names the file, "skip" leaves it out.
        recipe: recorded in the manifest; by default the settings given here.
        steps: what each step of a run did (`cveff.effects`), for the manifest and the report.
        name: the model's name in the bundle; by default its architecture.
        exits: of a model with early exits, what thresholds are chosen for: by default half a point lost at most. Such a
            model becomes a staged bundle (docs/early_exit.md), in float32.
        gate: of a model with early exits, what has to reach a threshold: "confidence" (by default), "entropy",
            "margin".
        progress: where long work shows itself.

    Returns:
        the bundle's path and manifest.

    Raises:
        StepError: neither data nor calibration, a setting out of range, a model in 16 bits or of another task than
            classification; said before any work.
        DataError: data that does not fit the model; said before any work.
        TargetError: unknown target, or no candidate within the limits; nothing is written then.
        ExportError: the model cannot be exported.
        CveffError: `out` cannot be written, or is something else than a bundle.
    """
    progress = progress or Silent()
    out = check_out(out)
    target = load_target(target)
    check_settings(max_accuracy_drop, num_calibration)
    if data is None and calibration is None:
        raise StepError("deploy needs data=… (labelled images) or calibration=… (a folder of images)")
    given = load(model) if not isinstance(model, Model) else model
    if given.spec.task != "classification":
        raise StepError(
            f"{given.spec.architecture} is a {given.spec.task} model; deploy is for classification, "
            "cveff.export writes its file"
        )
    original = _frozen(given)
    has_exits = isinstance(original.module, NetworkWithExits)
    goal, gate = check_goal(exits, gate, has_exits)
    settings = {
        "target": target.name,
        "max_accuracy_drop": max_accuracy_drop,
        "num_calibration": num_calibration,
        "seed": seed,
        "data": getattr(data, "name", None if data is None else str(data)),
        "calibration": None if calibration is None else str(calibration),
        **({"exits": goal.to_json(), "gate": gate} if has_exits else {}),
    }
    if data is not None and not isinstance(data, Data):
        from cveff.data.loading import load as load_data

        data = load_data(data, seed=seed, on_bad_image=on_bad_image, progress=progress)
    images = gather_images(
        original,
        data,
        calibration,
        target,
        num_calibration=num_calibration,
        seed=seed,
        on_bad_image=on_bad_image,
        progress=progress,
    )
    original = Model(replace(original.spec, labels=images.labels), original.module)
    if has_exits:
        path = deploy_exits(
            original,
            images,
            target,
            goal,
            gate,
            name=name,
            out=out,
            seed=seed,
            recipe=recipe if recipe is not None else {"deploy": settings},
            steps=steps,
            progress=progress,
        )
        return Deployment(path, read_manifest(path))
    with tempfile.TemporaryDirectory(prefix="cveff-deploy-") as temporary:
        work = Path(temporary)
        shipped, warnings = _merge_branches(original)
        progress.message(f"exporting {original.spec.architecture} to ONNX")
        export(shipped, work / ONNX)
        int8 = Int8(
            shipped,
            images.calibration,
            work,
            images.selection,
            max_accuracy_drop,
            scheme="cpu-signed" if target.scheme == "cpu-signed" else "cpu",
            clips=saturates(target.instruction_sets),
            seed=seed,
            progress=progress,
            exported=work / ONNX,
        )
        measured = measure(original, int8, images, target, max_accuracy_drop, work, seed, progress)
        manifest = deployment_manifest(name, shipped, images, target, max_accuracy_drop, measured)
        manifest["recipe"] = dict(recipe) if recipe is not None else {"deploy": settings}
        if steps:
            manifest["steps"] = [dict(step) for step in steps]
        progress.message("writing the report and the bundle")
        evidence = collect_evidence(
            measured.chosen,
            measured.candidates,
            images,
            measured.evaluation,
            original.spec.input,
            work,
            data=data,
            warnings=[*warnings, *images.warnings, *measured.warnings],
        )
        shipping = [measured.chosen, *(item for item in measured.candidates if item.is_prepared)]
        files = {
            ONNX: work / ONNX,
            **dict(file for item in shipping for file in model_files(item, work).items()),
        }
        path = write_bundle(out, manifest=manifest, files=files, report_html=render(manifest, evidence))
    return Deployment(path, read_manifest(path))


def _frozen(model: Model) -> Model:
    """A copy in evaluation mode, on the CPU, in float32: what every figure is compared with.

    Raises:
        StepError: the model computes in 16 bits, which float32 weights would not undo.
    """
    if is_cast(model.module):
        raise StepError(
            f"{model.spec.architecture} is in 16 bits; deploy starts from the float32 model, export writes this one"
        )
    return Model(model.spec, copy.deepcopy(model.module).cpu().float().eval())


def _merge_branches(model: Model) -> tuple[Model, list[str]]:
    """The model with its parallel branches merged, where it has any and merging keeps its answers."""
    from cveff.backbones import Reparameterize, has_branches
    from cveff.steps import Run

    if not has_branches(model.module):
        return model, []
    try:
        merged = Reparameterize()(Model(model.spec, copy.deepcopy(model.module)), Run())
    except StepError as error:
        return model, [f"The branches were not merged: {error}"]
    return merged, []
