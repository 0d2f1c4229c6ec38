"""The walk from a recipe to a bundle: data, model, training, steps, deployment. Top to bottom, nothing jumps back.

Each finished phase leaves a saved model in the run's folder, written whole or not at all. That is the whole record:
a run that was killed continues from the last one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cveff.apply import apply, check_steps, device_of, timer_of
from cveff.data import Data, channel_statistics
from cveff.data import load as load_data
from cveff.data.dataset import Split
from cveff.effects import START, Effect, Effects
from cveff.errors import DataError, RecipeError
from cveff.log import FileLog
from cveff.measure.accuracy import predict, top1
from cveff.measure.predictor import torch_predictor
from cveff.model import Model, create, load, save
from cveff.progress import Progress, Silent
from cveff.recipe import DataSettings, ModelSettings, Recipe
from cveff.run_folder import check_folder, open_folder, read_json
from cveff.runtime.errors import first_line
from cveff.steps import Clock, Run, Step
from cveff.subject import open_model
from cveff.target import load_target
from cveff.train import Train
from cveff.train.budget import parse_duration
from cveff.train.distributed import joined
from cveff.train.incubation import Incubate
from cveff.train.loop import SUMMARY
from cveff.train.stitching import Assemble
from cveff.train.timing import evaluation_seconds

if TYPE_CHECKING:
    from cveff.export.deploy import Deployment

SMALL_IMAGE = 64
"""Side in pixels up to which images are taken at their own size, by a network made for small images."""

_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class PipelineResult:
    """What a run made.

    Attributes:
        out: the run's folder.
        model: the saved model's folder, which `cveff.load` reads.
        accuracy: share of the evaluation split that the saved model gets right, in [0, 1].
        split, count: name of that split, and its images.
        num_parameters: of the saved model.
        effects: what each phase did, for a recipe with steps.
        consumed: by the recipe's training: steps, samples, epochs, FLOPs, seconds; under a budget also
            `budget_seconds`, and `command_seconds` up to here. Empty without training.
        deployment: the bundle, where the recipe deploys.
    """

    out: Path
    model: Path
    accuracy: float
    split: str
    count: int
    num_parameters: int
    effects: tuple[Effect, ...] = ()
    consumed: Mapping[str, float] = field(default_factory=dict)
    deployment: Deployment | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the bundle's manifest."""
        return {
            "out": str(self.out),
            "model": str(self.model),
            "accuracy": self.accuracy,
            "split": self.split,
            "count": self.count,
            "num_parameters": self.num_parameters,
            "steps": [effect.to_json() for effect in self.effects],
            "consumed": dict(self.consumed),
            "bundle": None if self.deployment is None else str(self.deployment.path),
            "manifest": None if self.deployment is None else self.deployment.manifest,
        }


def run(
    recipe: Recipe,
    *,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    bundle: bool = True,
    device: str | None = None,
    tensorboard: bool = False,
    progress: Progress | None = None,
    started: float | None = None,
) -> PipelineResult:
    """Do everything a recipe says.

    The run's folder holds `recipe.json`, `train/` (training state, `metrics.jsonl`), one saved model after each
    phase under `phases/`, `effects.json` with what each did, the final `model/`, and `model.bundle/` unless the recipe
    names another place.

    Args:
        resume: continue a run that stopped; where there is none, begin. The recipe must be the one it began with,
            except for what it deploys.
        overwrite: remove an earlier run in `out` and begin again.
        bundle: deploy, where the recipe says so; without, its target is only what steps measure on.
        device: where torch trains; by default a GPU if there is one.
        tensorboard: also write TensorBoard events.
        started: when the command began, by `time.monotonic`, which is where a budget counts from; by default now.

    Raises:
        RecipeError: `out` holds another run, or something that is no run.
        CveffError: whatever a phase refuses, such as missing data, or no candidate within the accuracy limit. What a
            step can tell beforehand is said before any work.
    """
    started = time.monotonic() if started is None else started
    out, progress = Path(out), progress or Silent()
    # A misspelt target is better found before training than after.
    target = None if recipe.deploy is None else load_target(recipe.deploy.target)
    if device is not None:
        check_device(device)
    check_folder(out, recipe, resume, overwrite)
    data = images_of(recipe.data, recipe.seed, progress)
    for warning in data.report.warnings:
        progress.message(f"warning: {warning}")
    phases = [(step, out / "phases" / f"{index}-{step.kind}") for index, step in enumerate(recipe.phases)]
    finished = [folder for _, folder in phases if folder.is_dir() and not overwrite]
    model = load(finished[-1]) if finished else create_for(recipe.model, data, seed=recipe.seed)
    teacher = _teacher(phases[: len(finished)], model, recipe, data)
    kinds = {folder.name: step.kind for step, folder in phases}
    if recipe.train is None:
        kinds = {START: START, **kinds}

    def phase(name: str) -> Model:
        if name == START:
            return create_for(recipe.model, data, seed=recipe.seed)
        return load(out / "phases" / name)

    with ExitStack() as stack:
        timer = None if target is None else stack.enter_context(timer_of(target))
        ahead = phases[len(finished) :]
        check_steps([step for step, _ in ahead], Run(data=data, target=target, teacher=teacher, timer=timer))
        stack.enter_context(open_folder(out, recipe, overwrite))
        if finished:
            progress.message(f"going on after {finished[-1].name}, which is done")
        effects = Effects(out, lambda model: _score(model, data.val, progress), progress)
        if recipe.steps and not finished and recipe.train is None:
            effects.note(START, START, model)
        exports = recipe.deploy is not None and bundle
        for step, folder in ahead:
            with ExitStack() as inner:
                log = inner.enter_context(FileLog(out / "train" / folder.name, tensorboard=tensorboard))
                if isinstance(step, Train) and step is recipe.train:
                    inner.enter_context(joined(device_of(device), step.distributed))
                model = apply(
                    model,
                    step,
                    data=data,
                    target=target,
                    device=device,
                    seed=recipe.seed,
                    teacher=teacher,
                    progress=progress,
                    log=log,
                    folder=out / "train" / folder.name,
                    resume=resume,
                    timer=timer,
                    clock=_clock(model, recipe, data, started, exports) if step is recipe.train else None,
                )
            save(model, folder)
            if recipe.steps:
                effects.note(folder.name, step.kind, model)
            teacher = model if isinstance(step, (Train, Incubate, Assemble)) else teacher
        save(model, out / "model")
        result = PipelineResult(
            out=out,
            model=out / "model",
            accuracy=evaluate(model, data, progress),
            split=data.evaluation.name,
            count=len(data.evaluation),
            num_parameters=model.num_parameters,
            consumed=_consumed(out, recipe, started),
            effects=effects.complete(kinds, phase, timer, target) if recipe.steps else (),
        )
    if recipe.deploy is None or not bundle:
        return result
    return replace(result, deployment=_deploy(model, recipe, data, result, resume, progress))


def assist(
    recipe: Recipe,
    *,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> None:
    """What ranks beside the first do of `run`: their part of the recipe's training. The arguments are those of `run`.

    What follows training is rank 0's alone.
    """
    step, out = recipe.train, Path(out)
    name = f"0-{Train.kind}"
    if step is None or ((out / "phases" / name).is_dir() and not overwrite):
        return
    data = images_of(recipe.data, recipe.seed, Silent())
    model = create_for(recipe.model, data, seed=recipe.seed)
    with joined(device_of(device), step.distributed):
        apply(
            model,
            step,
            data=data,
            device=device,
            seed=recipe.seed,
            folder=out / "train" / name,
            resume=resume,
        )


def _clock(model: Model, recipe: Recipe, data: Data, started: float, exports: bool) -> Clock | None:
    """What a training budget of the recipe counts from, and pays for after training."""
    if recipe.train is None or recipe.train.budget is None:
        return None
    splits = [data.evaluation, *([data.val] if recipe.steps else [])]
    writing = _writing_seconds(model, exports)

    def afterwards() -> float:
        scoring = [evaluation_seconds(lambda part: _score(model, part, Silent()), split) for split in splits]
        return writing + sum(scoring)

    return Clock(started, afterwards)


def _writing_seconds(model: Model, exports: bool) -> float:
    """How long it takes to save `model` after a phase and at the end, and to export it, by doing it."""
    from cveff.export.onnx import export

    with TemporaryDirectory() as folder:
        began = time.monotonic()
        save(model, Path(folder) / "model")
        seconds = 2 * (time.monotonic() - began)
        if exports:
            began = time.monotonic()
            export(model, Path(folder) / "model.onnx")
            seconds += time.monotonic() - began
        return seconds


def _consumed(out: Path, recipe: Recipe, started: float) -> dict[str, float]:
    if recipe.train is None:
        return {}
    figures = read_json(out / "train" / f"0-{recipe.train.kind}" / SUMMARY)
    if figures and recipe.train.budget is not None:
        figures["budget_seconds"] = parse_duration(recipe.train.budget)
        figures["command_seconds"] = time.monotonic() - started
    return figures


def _teacher(finished: Sequence[tuple[Step, Path]], model: Model, recipe: Recipe, data: Data) -> Model:
    """What steps may imitate: the model that the last finished training left, before any the one the recipe names."""
    if not finished:
        return model
    trained = [folder for step, folder in finished if isinstance(step, (Train, Incubate, Assemble))]
    if not trained:
        return create_for(recipe.model, data, seed=recipe.seed)
    return model if trained[-1] == finished[-1][1] else load(trained[-1])


def create_for(settings: ModelSettings, data: Data, *, seed: int = 0) -> Model:
    """Build the network a recipe names, for the classes and the images of `data`.

    A network that starts from random weights is normalised by the data's own statistics, one with given weights by
    the architecture's. Images smaller than the input are enlarged, when training as in the bundle.

    Raises:
        UnknownModelError, CheckpointError: as `cveff.create` and `cveff.load`.
        DataError: there is nothing to train or score on, or a checkpoint's classes are not the data's.
    """
    import torch

    if settings.checkpoint is not None:
        from cveff.export.deploy_checks import check_labels

        model = open_model(settings.checkpoint)
        labels, _ = check_labels(model, data)
        return Model(replace(model.spec, labels=labels), model.module)
    images = data.train if data.train is not None else data.val
    size, channels = settings.image_size, settings.channels or images.channels
    is_small = images.native_size is not None and max(images.native_size) <= SMALL_IMAGE
    if size is None and is_small:
        size = images.native_size
    architecture = settings.architecture or ("small_resnet_s" if is_small else "mobilenetv4_conv_small")
    torch.manual_seed(seed)  # the initial weights
    model = create(
        architecture,
        labels=data.labels,
        image_size=size,
        channels=channels,
        weights=settings.weights,
        pretrained=settings.pretrained,
        timm_arguments=settings.arguments,
    )
    spec = model.spec.input
    if settings.weights is None and not settings.pretrained:
        mean, std = channel_statistics(images, channels)
        spec = replace(spec, mean=mean, std=std)
    if images.native_size == spec.size:
        spec = replace(spec, crop=1.0)  # nothing to resize or to crop
    enlarge = settings.enlarge
    if enlarge is None:
        enlarge = images.native_size is not None and min(images.native_size) < max(spec.size)
    return Model(replace(model.spec, input=replace(spec, enlarge=enlarge)), model.module)


def evaluate(model: Model, data: Data, progress: Progress | None = None) -> float:
    """Share of `data.evaluation` that `model` gets right in PyTorch, in [0, 1].

    Raises:
        DataError: that split has no labels.
    """
    accuracy = _score(model, data.evaluation, progress or Silent())
    if accuracy is None:
        raise DataError(f"split {data.evaluation.name!r} of {data.name} has no labels to score against")
    return accuracy


def _score(model: Model, split: Split, progress: Progress) -> float | None:
    """Share of a split that `model` gets right; None without labels."""
    batches = split.evaluation_batches(model.spec.input, batch_size=_EVALUATION_BATCH)
    count = math.ceil(len(split) / _EVALUATION_BATCH)
    logits, targets = predict(
        torch_predictor(model), progress.track(batches, f"scoring on {split.name}", count)
    )
    return None if targets is None else top1(logits, targets)


def _deploy(
    model: Model, recipe: Recipe, data: Data, result: PipelineResult, resume: bool, progress: Progress
) -> Deployment:
    from cveff.export.deploy import Deployment, deploy

    assert recipe.deploy is not None
    bundle = recipe.deploy.out or result.out / "model.bundle"
    values = recipe.to_json()
    manifest = read_json(bundle / "manifest.json") if resume else {}
    if manifest.get("recipe") == values:
        progress.message(f"{bundle} is done")
        return Deployment(bundle, manifest)
    return deploy(
        model,
        data=data,
        calibration=recipe.deploy.calibration,
        target=recipe.deploy.target,
        max_accuracy_drop=recipe.deploy.max_accuracy_drop,
        num_calibration=recipe.deploy.num_calibration,
        on_bad_image=recipe.data.on_bad_image,
        out=bundle,
        seed=recipe.seed,
        recipe=values,
        steps=[effect.to_json() for effect in result.effects],
        progress=progress,
    )


def images_of(settings: DataSettings, seed: int, progress: Progress) -> Data:
    """The images that a `[data]` table names, split by `seed`."""
    return load_data(
        settings.source,
        seed=seed,
        on_bad_image=settings.on_bad_image,
        val_fraction=settings.val_fraction,
        progress=progress,
    )


def check_device(device: str) -> None:
    """Refuse a device that this machine lacks.

    Raises:
        RecipeError: torch cannot compute there.
    """
    import torch

    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)[:100]
        raise RecipeError(
            f"device {device!r} cannot be used ({reason}); give cpu, or cuda where there is one"
        ) from error
