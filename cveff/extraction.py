"""`cveff elastic extract` as a library: from an elastic checkpoint to a plain model in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cveff.apply import apply
from cveff.data.dataset import OnBadImage
from cveff.dynamic import ElasticSpace, ExtractSubNet
from cveff.dynamic.elastic_space import space_of
from cveff.dynamic.extract import RECORD
from cveff.export.deploy_checks import check_labels
from cveff.files import atomic_folder, write_json
from cveff.model import Model, save
from cveff.origin import check_checkpoint, images_for, name_of, origin_of
from cveff.pipeline import check_device, evaluate, images_of
from cveff.progress import Progress, Silent
from cveff.subject import check_result_folder, open_model


@dataclass(frozen=True)
class Extraction:
    """What `extract_checkpoint` made.

    Attributes:
        out: the folder: the saved model in `model`, what it is in `subnet.json`.
        subnet: which sub-net it is, as plain JSON values.
        figures: `extract/accuracy` on the images it was chosen by; of a search, milliseconds too.
        accuracy: share of the evaluation split that it is right on.
        parameters, elastic_parameters: its number, and the whole network's.
        warnings: what a reader must know.
    """

    out: Path
    subnet: Mapping[str, Any]
    figures: Mapping[str, float]
    accuracy: float
    parameters: int
    elastic_parameters: int
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "out": str(self.out),
            "subnet": dict(self.subnet),
            "figures": dict(self.figures),
            "accuracy": self.accuracy,
            "parameters": self.parameters,
            "elastic_parameters": self.elastic_parameters,
            "warnings": list(self.warnings),
        }


def extract_checkpoint(
    checkpoint: str,
    step: ExtractSubNet,
    *,
    out: Path | None = None,
    data: str | None = None,
    on_bad_image: OnBadImage | None = None,
    target: str | None = None,
    overwrite: bool = False,
    seed: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Extract a sub-net of a saved elastic model and save it as a plain one.

    Args:
        checkpoint: a saved model's or a run's folder.
        step: which sub-net, or the limit to search for one with.
        out: folder of the result; by default `runs/NAME-subnet`.
        data: labelled images; by default those that the checkpoint was trained on.
        on_bad_image: "error" or "skip"; by default as in training.
        target: the device that milliseconds are of.
        overwrite: replace what an earlier call left.
        seed: by default that of the training, for the same split.
        device: where torch computes; by default a GPU if there is one.

    Raises:
        RecipeError: it is not known which images to use.
        StepError: the model is not elastic, holds no such sub-net, or none is fast enough.
        CveffError: `out` holds something else. Nothing is written then.
    """
    progress = progress or Silent()
    check_checkpoint(checkpoint)
    out = out or Path("runs") / f"{name_of(checkpoint)}-subnet"
    check_result_folder(checkpoint, out, RECORD, "cveff elastic extract", overwrite)
    if device is not None:
        check_device(device)
    origin = origin_of(checkpoint)
    seed = seed if seed is not None else 0 if origin is None else origin.seed
    model = open_model(checkpoint)
    space_of(model.spec.edits, model.spec.architecture)
    images = images_of(images_for(checkpoint, data, on_bad_image, origin), seed, progress)
    labels, warnings = check_labels(model, images)
    model = Model(replace(model.spec, labels=labels), model.module)
    with atomic_folder(out) as folder:
        found = apply(
            model,
            step,
            data=images,
            target=target,
            device=device,
            seed=seed,
            progress=progress,
            folder=folder,
        )
        save(found, folder / "model")
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        made = Extraction(
            out,
            record["subnet"],
            record["figures"],
            evaluate(found, images, progress),
            found.num_parameters,
            model.num_parameters,
            (*images.report.warnings, *warnings),
        )
        write_json(folder / RECORD, made.to_json())
    return made


def elastic_space(checkpoint: str) -> ElasticSpace:
    """The sub-nets that a saved model holds.

    Raises:
        StepError: it is not elastic.
    """
    check_checkpoint(checkpoint)
    spec = open_model(checkpoint).spec
    return space_of(spec.edits, spec.architecture)
