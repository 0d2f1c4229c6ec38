"""A whole job without a recipe: from what a user names to a bundle, training first what has no weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import timm

from cveff.data import load as load_data
from cveff.errors import RecipeError
from cveff.model import create
from cveff.pipeline import run
from cveff.progress import Progress
from cveff.recipe import DataSettings, DeploySettings, ModelSettings, Recipe, default_training
from cveff.subject import is_architecture, open_model, read_labels

if TYPE_CHECKING:
    from cveff.export.deploy import Deployment


def deploy_subject(
    subject: str,
    deploy: DeploySettings,
    *,
    data: DataSettings | None = None,
    start: ModelSettings | None = None,
    labels: Path | None = None,
    epochs: int | None = None,
    run_folder: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Deployment:
    """Deploy whatever a user names.

    Args:
        subject: a saved model or run, a card's name, or an architecture's name.
        data: what to train and to score on; needed where the subject has no weights.
        start: weights, image size and channels of an architecture; its `architecture` is ignored.
        labels: a text file with the classes' names, for an architecture with weights and without data.
        epochs: train this long first; by default only an architecture without `start.weights`.
        run_folder: where training keeps its state; by default `runs/SUBJECT`.

    Raises:
        RecipeError: options that contradict each other.
        CveffError: as `cveff.pipeline.run` and `cveff.deploy`.
    """
    start = start or ModelSettings()
    deploy = replace(deploy, out=deploy.out or Path(f"{Path(subject).name}.bundle"))
    if not is_architecture(subject) and (epochs is not None or start.pretrained):
        raise RecipeError(f"{subject} has weights of its own; remove --epochs and --pretrained")
    if not is_architecture(subject) or (start.weights is not None and epochs is None):
        return _deploy_as_it_is(subject, deploy, data, start, labels, seed, progress)
    if not timm.is_model(subject):
        create(subject)  # says that there is no such model, and what comes close
    if data is None:
        raise RecipeError(f"{subject} has no weights; give --weights FILE, or --data to train it")
    if labels is not None:
        raise RecipeError("--labels cannot be combined with training; the names come from --data")
    recipe = Recipe(
        data=data,
        model=replace(start, architecture=subject),
        train=default_training(data.source, epochs, start.pretrained or start.weights is not None),
        deploy=deploy,
        seed=seed,
    )
    folder = run_folder or Path("runs") / subject
    result = run(recipe, out=folder, resume=resume, overwrite=overwrite, progress=progress)
    assert result.deployment is not None
    return result.deployment


def _deploy_as_it_is(
    subject: str,
    settings: DeploySettings,
    data: DataSettings | None,
    start: ModelSettings,
    labels: Path | None,
    seed: int,
    progress: Progress | None,
) -> Deployment:
    from cveff.export.deploy import deploy

    names = None if labels is None else read_labels(labels)
    images = None
    if data is not None:
        images = load_data(
            data.source,
            seed=seed,
            on_bad_image=data.on_bad_image,
            val_fraction=data.val_fraction,
            progress=progress,
        )
        if is_architecture(subject) and names is None:
            names = images.labels
    model = open_model(
        subject, weights=start.weights, labels=names, image_size=start.image_size, channels=start.channels
    )
    assert settings.out is not None
    return deploy(
        model,
        data=images,
        calibration=settings.calibration,
        target=settings.target,
        max_accuracy_drop=settings.max_accuracy_drop,
        num_calibration=settings.num_calibration,
        on_bad_image="error" if data is None else data.on_bad_image,
        out=settings.out,
        seed=seed,
        progress=progress,
    )
