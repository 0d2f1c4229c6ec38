"""`cveff compress` as a library: from a trained model and a few words to a recipe, and to a look at what it would cut.

The recipe runs through `cveff.pipeline` like any other, so a compression resumes, and its record says what was done.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from cveff.apply import check_steps, device_of, timer_of
from cveff.compress import Distill, LowRank, Prune, Quantize, Sparsify
from cveff.compress.blocks import macs
from cveff.compress.prune_plan import Plan
from cveff.compress.trace import trace
from cveff.data.dataset import OnBadImage
from cveff.errors import RecipeError
from cveff.model import Model
from cveff.origin import check_checkpoint, images_for, name_of, origin_of
from cveff.pipeline import check_device, create_for, images_of
from cveff.progress import Progress, Silent
from cveff.recipe import DeploySettings, ModelSettings, Recipe, default_training, with_overrides
from cveff.schema import parse
from cveff.steps import Run, Step
from cveff.target import load_target
from cveff.train import Train

T = TypeVar("T")

DEFAULT = "default"
"""What an option given without a value stands for."""
EPOCHS = 20
"""Of fine-tuning, where nothing is said: about what the zoo's models need to come back from half their latency."""


def compression_recipe(
    checkpoint: str,
    *,
    prune: str | None = None,
    low_rank: str | None = None,
    sparsify: str | None = None,
    distill: str | None = None,
    quantize: str | None = None,
    epochs: int | None = None,
    data: str | None = None,
    on_bad_image: OnBadImage | None = None,
    deploy: DeploySettings | None = None,
    seed: int | None = None,
) -> Recipe:
    """The recipe of a compression: prune, low rank, sparsify, distil, quantize, in this order, what is asked for.

    Without any step it prunes to half the latency and distils. The images and the seed are by default those the
    checkpoint was trained with, because another seed could validate on images it was trained on.

    Args:
        checkpoint: a saved model's or a run's folder, or a zoo card's name.
        prune, low_rank: a goal such as "latency=0.5", or several settings of the step: "latency=0.5,depth=true".
        sparsify: "2:4", a share of zeros, or settings.
        distill: settings of `Distill` and of its training: "method=dist,epochs=30,learning_rate=5e-4".
            "default" stands for a step's defaults, here half and eight tenths of the latency.
        quantize: a precision, or settings: "int8", "precision=int8,weights=learned".
        epochs: of fine-tuning; given alone it asks for distillation.
        data, on_bad_image: as a recipe's; by default the checkpoint's own.
        deploy: target, and what a bundle may lose.

    Raises:
        RecipeError: a setting is unknown or out of range, or it is not known which images to use.
        UnknownModelError: no such checkpoint.
    """
    check_checkpoint(checkpoint)
    origin = origin_of(checkpoint)
    images = images_for(checkpoint, data, on_bad_image, origin)
    if epochs is not None and distill is None:
        distill = DEFAULT
    if all(text is None for text in (prune, low_rank, sparsify, distill, quantize)):
        prune, distill = DEFAULT, DEFAULT
    steps: list[Step] = []
    if prune is not None:
        steps.append(_step(Prune, "--prune", prune, "latency", {"latency": 0.5}))
    if low_rank is not None:
        steps.append(_step(LowRank, "--low-rank", low_rank, "latency", {"latency": 0.8}))
    if sparsify is not None:
        steps.append(_step(Sparsify, "--sparsify", _pattern(sparsify), "pattern", {}))
    if distill is not None:
        steps.append(_distillation(distill, epochs, images.source, origin))
    if quantize is not None:
        steps.append(_step(Quantize, "--quantize", quantize, "precision", {}))
    return Recipe(
        data=images,
        model=ModelSettings(checkpoint=checkpoint),
        steps=tuple(steps),
        deploy=deploy or DeploySettings(),
        seed=seed if seed is not None else 0 if origin is None else origin.seed,
    )


def default_folder(checkpoint: str) -> Path:
    """Where a compression goes: beside the other runs, under the checkpoint's name."""
    return Path("runs") / f"{name_of(checkpoint)}-compressed"


@dataclass(frozen=True, eq=False)
class Preview:
    """What pruning would do.

    Attributes:
        plan: groups, what they keep, what is frozen and why.
        before, after: `macs`, `parameters` and, where the goal is one of time, `latency_ms`, measured.
    """

    plan: Plan
    before: Mapping[str, float]
    after: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.plan.to_json(), "before": dict(self.before), "after": dict(self.after)}


def preview(recipe: Recipe, *, device: str | None = None, progress: Progress | None = None) -> Preview:
    """Plan the recipe's first pruning, and change and write nothing.

    Raises:
        RecipeError: the recipe does not prune.
        CveffError: whatever pruning refuses, such as a goal that cannot be reached.
    """
    step = next((step for step in recipe.steps if isinstance(step, Prune)), None)
    if step is None:
        raise RecipeError(
            "a plan shows what pruning would cut, and nothing is pruned; add --prune latency=0.5"
        )
    progress = progress or Silent()
    target = None if recipe.deploy is None else load_target(recipe.deploy.target)
    if device is not None:
        check_device(device)
    data = images_of(recipe.data, recipe.seed, progress)
    model = create_for(recipe.model, data, seed=recipe.seed)
    run = Run(
        data=data,
        target=target,
        device=device_of(device),
        seed=recipe.seed,
        progress=progress,
        teacher=model,
    )
    with nullcontext() if target is None else timer_of(target) as run.timer:
        check_steps([step], run)
        plan = step.plan(model, run)
        small = plan.structure(model)
        before, after = _figures(model), _figures(small)
        if run.timer is not None:
            times = run.timer.milliseconds({"before": model, "after": small})
            before["latency_ms"], after["latency_ms"] = times["before"], times["after"]
    return Preview(plan, before, after)


def _figures(model: Model) -> dict[str, float]:
    return {"macs": macs(trace(model.module, model.spec.input)), "parameters": model.num_parameters}


def _step(step: type[T], option: str, text: str, first: str, default: Mapping[str, Any]) -> T:
    values = dict(default) if text == DEFAULT else _values(option, text, first)
    return parse(step, with_overrides({}, values), option)


def _pattern(text: str) -> str:
    """A share of zeros means an unstructured pattern."""
    return f"pattern=unstructured,sparsity={text}" if re.fullmatch(r"0?\.\d+", text) else text


def _distillation(text: str, epochs: int | None, source: str, origin: Recipe | None) -> Distill:
    """Distillation whose images look like those the checkpoint was trained on."""
    training = origin.train if origin is not None and origin.data.source == source else None
    augmentation = (training or default_training(source)).augmentation
    values = {} if text == DEFAULT else _values("--distill", text, "method")
    own = set(Distill.__dataclass_fields__)
    values = {
        key
        if key.partition(".")[0] in own or key not in Train.__dataclass_fields__
        else f"train.{key}": value
        for key, value in values.items()
    }
    length = values.pop("train.epochs", EPOCHS if epochs is None else epochs)
    if epochs is not None and length != epochs:
        raise RecipeError(f"--distill epochs={length} and --epochs {epochs} differ; remove one")
    # Of a few hundred validation images many epochs are as good as the best, and the first of them has learnt least.
    base = {"train": {"keep": "last", "augmentation": asdict(augmentation)}}
    values = {"train.warmup_epochs": 0.1 * length, **values, "train.epochs": length}
    return parse(Distill, with_overrides(base, values), "--distill")


def _values(option: str, text: str, first: str) -> dict[str, Any]:
    """`a=1,b=x` as values by key; a first word without a key is the value of `first`."""
    values: dict[str, Any] = {}
    for index, part in enumerate(re.split(r",(?=\s*[A-Za-z_][\w.]*\s*=)", text)):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and index == 0:
            key, value = first, key
        if not key or not value:
            raise RecipeError(f"{option} {text!r} is not KEY=VALUE[,KEY=VALUE…], such as {option} {first}=…")
        try:
            values[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = value
    return values
