"""`cascade`: bundles composed after the fact, small and fast first; one staged bundle comes out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from cveff.data.dataset import Data, OnBadImage
from cveff.dynamic.thresholds import Goal
from cveff.errors import BundleError, DataError, StepError
from cveff.export.deploy import Deployment
from cveff.export.deploy_checks import FEW_IMAGES, check_out
from cveff.export.staged import Parts
from cveff.export.write_staged import write_staged
from cveff.progress import Progress, Silent
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.machine import usable_cores
from cveff.runtime.manifest import FILE_NAME, ModelFile, locate, model_files, read_manifest, verify_files
from cveff.runtime.stages import Stage, read_stages


def cascade(
    bundles: str | Path | Sequence[str | Path],
    *,
    data: Data | str | Path,
    out: str | Path,
    exits: Goal | None = None,
    gate: str = "confidence",
    threads: int | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    seed: int = 0,
    on_bad_image: OnBadImage = "error",
    name: str | None = None,
    progress: Progress | None = None,
) -> Deployment:
    """Compose bundles into one: an image goes on to the next where the one before is not certain.

    Thresholds are chosen on `data.val`, the reported figures are of `data.test` where there is one. One staged bundle
    alone gets new thresholds.

    Args:
        bundles: folders, fast to accurate; staged ones bring all their stages. Each may take images of its own size:
            the runtime makes them of the last one's, which must be the largest.
        exits: what thresholds are chosen for; shares of time and points are of the last bundle alone. By default no
            accuracy is lost, one standard error included.
        gate: "confidence", "entropy" or "margin".
        threads: of every engine; by default every core this process may use.
        batch_sizes: that are timed.
        name: of the model in the manifest; by default the bundles' names.

    Returns:
        the bundle's path and manifest.

    Raises:
        BundleError: bundles of other labels, tasks or channels, damaged ones, or none to choose between.
        DataError: data of other classes, or without labels.
        StepError: no thresholds meet the goal.
        CveffError: `out` cannot be written, or is something else than a bundle.
    """
    progress = progress or Silent()
    out = check_out(out)
    paths = [Path(bundles)] if isinstance(bundles, (str, Path)) else [Path(path) for path in bundles]
    if not batch_sizes or min(batch_sizes) < 1:
        raise StepError(f"batch_sizes is {tuple(batch_sizes)!r}; give positive integers")
    manifests = [_read(path) for path in paths]
    _check_fit(paths, manifests)
    threads = threads or usable_cores()
    if not isinstance(data, Data):
        from cveff.data.loading import load as load_data

        data = load_data(data, seed=seed, on_bad_image=on_bad_image, progress=progress)
    labels = tuple(manifests[-1]["labels"])
    warnings = _check_data(data, labels)
    with tempfile.TemporaryDirectory(prefix="cveff-cascade-") as temporary:
        parts = _gather(paths, manifests, Path(temporary), threads, name)
        made = write_staged(
            parts,
            data.val,
            data.evaluation,
            goal=exits or Goal(accuracy_drop=0.0),
            gate=gate,
            threads=threads,
            batch_sizes=batch_sizes,
            seed=seed,
            out=out,
            extra={
                "recipe": {"cascade": {"bundles": [path.name for path in paths], "gate": gate, "seed": seed}}
            },
            warnings=warnings,
            progress=progress,
        )
    return Deployment(made, read_manifest(made))


def _read(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    verify_files(path, manifest)
    return manifest


def _check_fit(paths: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> None:
    last = manifests[-1] if manifests else {}
    if len(manifests) < 2 and "stages" not in last:
        raise BundleError(
            "a cascade needs two bundles or more, fast to accurate, or one that has stages already"
        )
    size, channels = last["input"]["size"], last["input"]["channels"]
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest["task"] != "classification":
            raise BundleError(f"{path} is a {manifest['task']} bundle; only classifiers can be left early")
        if manifest["labels"] != last["labels"]:
            raise BundleError(
                f"{path} has {_some(manifest['labels'])}, {paths[-1]} has {_some(last['labels'])}; "
                f"stages must have the "
                "same labels in the same order"
            )
        own = manifest["input"]
        if own["channels"] != channels:
            raise BundleError(
                f"{path} takes {own['channels']} channels, {paths[-1]} takes {channels}; stages must take the same"
            )
        if own["size"][0] > size[0] or own["size"][1] > size[1]:
            raise BundleError(
                f"{path} takes images {own['size']}, larger than {size} of {paths[-1]}; images are made "
                f"smaller for earlier "
                "stages, so put the one with the largest last"
            )


def _check_data(data: Data, labels: tuple[str, ...]) -> list[str]:
    if len(data.labels) != len(labels):
        raise DataError(f"the bundles have {len(labels)} classes but {data.name} has {len(data.labels)}")
    for split in (data.val, data.evaluation):
        if split.targets is None or not len(split):
            raise DataError(
                f"split {split.name!r} of {data.name} has no labelled images to choose thresholds on"
            )
    if tuple(data.labels) != labels and set(data.labels) == set(labels):
        raise DataError(
            f"the labels of {data.name} stand in another order than the bundles'; order them alike"
        )
    if len(data.val) < FEW_IMAGES:
        return [f"Thresholds were chosen on {len(data.val)} images only."]
    return []


def _gather(
    paths: Sequence[Path], manifests: Sequence[dict[str, Any]], folder: Path, threads: int, name: str | None
) -> Parts:
    """Every bundle's files in `folder`, each in a folder of its own, and the stages that they make."""
    stages: list[Stage] = []
    files: list[str] = []
    for index, (path, manifest) in enumerate(zip(paths, manifests, strict=True)):
        place = f"part{index + 1}"
        own = read_stages(manifest, str(path / FILE_NAME))
        whole = model_files(manifest)[0]
        if own is None:
            spec = InputSpec.from_json(manifest["input"])
            found = [Stage(path.stem, whole, spec.size, spec.interpolation)]
        else:
            found = [
                replace(stage, name=f"{path.stem}: {stage.name}" if len(paths) > 1 else stage.name)
                for stage in own.stages
            ]
        needed = {stage.file.file for stage in found} | ({whole.file} if path == paths[-1] else set())
        copied = [file for needed_file in sorted(needed) for file in _with_companions(manifest, needed_file)]
        for file in dict.fromkeys(copied):
            target = folder / place / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(locate(path, file), target)
            files.append(f"{place}/{file}")
        stages += [
            replace(stage, file=_moved(stage.file, place, threads), threshold=float("inf"), exits=0)
            for stage in found
        ]
    last = manifests[-1]
    return Parts(
        folder=folder,
        stages=tuple(stages),
        full=_moved(model_files(last)[0], f"part{len(paths)}", threads),
        files=tuple(files),
        input=InputSpec.from_json(last["input"]),
        labels=tuple(last["labels"]),
        description={
            "name": name or " → ".join(path.stem for path in paths),
            "architecture": " → ".join(manifest["model"]["architecture"] for manifest in manifests),
            "parameters": sum(manifest["model"]["parameters"] for manifest in manifests),
            "edits": [],
        },
        full_name=f"{paths[-1].stem} alone" if len(paths) > 1 else "the whole network",
    )


def _with_companions(manifest: dict[str, Any], file: str) -> list[str]:
    """A file and those that an engine looks for beside it: of the same name with other suffixes."""
    stem = str(PurePosixPath(file).with_suffix(""))
    listed = [entry["path"] for entry in manifest["files"]]
    engines_own = (".bin", ".onnx", ".plan", ".plan.json", ".onnx.data", ".data")
    beside = [path for path in listed if any(path == stem + suffix for suffix in engines_own)]
    is_alone = file.endswith((".onnx", ".pt2"))
    return [
        file,
        *(path for path in beside if path != file and not (is_alone and not path.endswith(".data"))),
    ]


def _moved(file: ModelFile, place: str, threads: int) -> ModelFile:
    return replace(file, file=f"{place}/{file.file}", threads=threads)


def _some(labels: Sequence[str]) -> str:
    return f"{len(labels)} labels ({', '.join(labels[:3])}, …)"
