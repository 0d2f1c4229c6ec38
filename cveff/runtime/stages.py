"""`stages` of a manifest: the files of a network that images may leave early, in order, and what was calibrated.

The key is an addition: a program that does not know it runs the manifest's `engine`, which is the whole network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import BundleError, CveffError
from .gates import GATES
from .manifest import FILE_NAME, ModelFile, entry_value, model_entry

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True)
class Stage:
    """One file of a staged bundle.

    Attributes:
        name: what tables call it.
        file: how it runs.
        size: (height, width) of the images it takes; the runtime makes them of the bundle's by `interpolation`. Of a
            stage that goes on from the one before it, that one's.
        goes_on: whether it takes what earlier stages carried, and not images.
        batches: sizes it is run with, ascending; a batch is filled up to one, or split. Empty: any size.
        threshold: images whose certainty reaches it leave here; infinite: none does. The last stage's is not read.
        exits: images that left here of those calibrated with.
    """

    name: str
    file: ModelFile
    size: tuple[int, int]
    interpolation: str = "bicubic"
    goes_on: bool = False
    batches: tuple[int, ...] = ()
    threshold: float = math.inf
    exits: int = 0

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry; a threshold that nothing reaches is null."""
        return {
            "stage": self.name,
            "name": self.file.engine,
            "precision": self.file.precision,
            "file": self.file.file,
            "threads": self.file.threads,
            "options": dict(self.file.options),
            "size": list(self.size),
            "interpolation": self.interpolation,
            "goes_on": self.goes_on,
            "batches": list(self.batches),
            "threshold": self.threshold if math.isfinite(self.threshold) else None,
            "exits": self.exits,
        }


@dataclass(frozen=True)
class Stages:
    """The stages of a bundle and the gate between them."""

    gate: str
    stages: tuple[Stage, ...]

    def to_json(self) -> dict[str, Any]:
        """The manifest's entries that `parse_stages` reads."""
        return {"gate": self.gate, "files": [stage.to_json() for stage in self.stages]}

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Of every stage but the last."""
        return tuple(stage.threshold for stage in self.stages[:-1])


def read_stages(manifest: Mapping[str, Any], name: str = FILE_NAME) -> Stages | None:
    """The checked `stages` of a manifest that `read_manifest` has checked; None where there are none.

    Raises:
        BundleError: names the key.
    """
    if "stages" not in manifest:
        return None
    stages = parse_stages(entry_value(manifest, "stages", dict, name), f"{name}: stages")
    if manifest["task"] != "classification":
        raise BundleError(f"{name}: stages of a {manifest['task']} model; there must be a classifier's")
    listed = {entry["path"] for entry in manifest["files"]}
    for stage in stages.stages:
        needed = [stage.file.file]
        if stage.file.file.endswith(".xml"):
            needed.append(stage.file.file.removesuffix(".xml") + ".bin")
        for file in needed:
            if file not in listed:
                raise BundleError(f"{name}: files does not list {file!r}, which stage {stage.name!r} opens")
    return stages


def parse_stages(values: Mapping[str, Any], where: str) -> Stages:
    """Stages from plain JSON values; `where` begins the messages.

    Raises:
        BundleError: names the key.
    """
    gate = entry_value(values, "gate", str, where)
    if gate not in GATES:
        raise BundleError(
            f"{where}.gate is {gate!r}; this program knows {', '.join(GATES)}. Upgrade cveff, or use the "
            f"bundle's run.py"
        )
    entries = entry_value(values, "files", list, where)
    if len(entries) < 2:
        raise BundleError(f"{where}: {len(entries)} files; there must be two or more")
    return Stages(
        gate, tuple(_stage(entry, index, f"{where}.files[{index}]") for index, entry in enumerate(entries))
    )


def check_thresholds(thresholds: Sequence[float], num_stages: int) -> tuple[float, ...]:
    """Thresholds for a network of so many stages: one for each but the last; infinite ones are allowed.

    Raises:
        CveffError: another number of them, or one that is no number.
    """
    values = tuple(float(value) for value in thresholds)
    if len(values) != num_stages - 1:
        raise CveffError(
            f"{len(values)} thresholds were given for {num_stages} stages, which need {num_stages - 1}: "
            f"one for each exit "
            "but the last; these belong to a model with other exits"
        )
    if any(math.isnan(value) for value in values):
        raise CveffError(f"thresholds are {list(values)}; nan is none, inf lets no image leave")
    return values


def _stage(entry: Any, index: int, where: str) -> Stage:
    file = model_entry(entry, where)
    size = entry_value(entry, "size", list, where)
    if len(size) != 2 or not all(_is_positive(side) for side in size):
        raise BundleError(f"{where}.size is {size!r}; it must be [height, width]")
    batches = entry_value(entry, "batches", list, where)
    if not all(map(_is_positive, batches)) or batches != sorted(set(batches)):
        raise BundleError(f"{where}.batches is {batches!r}; it must be ascending positive integers")
    interpolation = entry_value(entry, "interpolation", str, where)
    if interpolation not in INTERPOLATIONS:
        raise BundleError(
            f"{where}.interpolation is {interpolation!r}; it must be one of {', '.join(INTERPOLATIONS)}"
        )
    goes_on = entry_value(entry, "goes_on", bool, where)
    if goes_on and index == 0:
        raise BundleError(f"{where}: goes_on is true, and there is no stage before it")
    threshold = entry_value(entry, "threshold", (int, float, type(None)), where)
    exits = entry_value(entry, "exits", int, where)
    if exits < 0:
        raise BundleError(f"{where}.exits is {exits}; it must not be negative")
    return Stage(
        name=entry_value(entry, "stage", str, where),
        file=file,
        size=(size[0], size[1]),
        interpolation=interpolation,
        goes_on=goes_on,
        batches=tuple(batches),
        threshold=math.inf if threshold is None else float(threshold),
        exits=exits,
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
