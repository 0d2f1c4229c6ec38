"""`Recipe`: a whole job as data: which model, which images, how to train, which steps, what to deploy to.

A recipe is TOML; every section is a frozen dataclass, so the Python and the file say the same. A method joins by
one line in `_step_kinds`.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cveff.apply import needs_timer
from cveff.backbones import FoldBatchNorm, Reparameterize
from cveff.compress import Distill, LowRank, Prune, Quantize, Sparsify
from cveff.compress.quantize import TRAINABLE
from cveff.data.augment import Augmentation
from cveff.data.named import NAMED
from cveff.dynamic import CondConv, EarlyExit, Elastic, ExtractSubNet, GlanceFocus, ReduceTokens
from cveff.errors import RecipeError
from cveff.recipe_settings import DataSettings, DeploySettings, ModelSettings
from cveff.schema import parse
from cveff.steps import Step
from cveff.train import MergeAdapters, Train, Tune
from cveff.train.incubation import Incubate
from cveff.train.stitching import Assemble

__all__ = [
    "RECIPES",
    "DataSettings",
    "DeploySettings",
    "ModelSettings",
    "Recipe",
    "default_training",
    "find_recipe",
    "parse_assignment",
    "parse_recipe",
    "read_recipe",
    "recipe_for",
    "recipe_names",
    "with_assembly",
    "with_budget",
    "with_epochs",
    "with_overrides",
]

RECIPES = Path(__file__).parent / "model_zoo" / "recipes"
"""The recipes that come with cveff."""


def _step_kinds() -> dict[str, type]:
    """The recipe's union: every method a `[[steps]]` table can name by its `kind`."""
    steps = (
        Reparameterize,
        FoldBatchNorm,
        Train,
        Prune,
        LowRank,
        Distill,
        Sparsify,
        Tune,
        MergeAdapters,
        ReduceTokens,
        CondConv,
        Quantize,
        EarlyExit,
        GlanceFocus,
        Incubate,
        Assemble,
        Elastic,
        ExtractSubNet,
    )
    return {step.kind: step for step in steps}


@dataclass(frozen=True)
class Recipe:
    """A whole job, top to bottom.

    Attributes:
        data: the images.
        model: the network.
        train: how to train; without this table the weights stay as the `model` table gave them.
        steps: what is done to the trained model, in order; each `[[steps]]` table has a `kind`.
        deploy: what the model is made into; without this table the run ends with the saved model.
        seed: all randomness derives from it.

    Raises:
        RecipeError: at construction, for settings that contradict each other; the message starts with the key.
    """

    data: DataSettings
    model: ModelSettings = field(default_factory=ModelSettings)
    train: Train | None = None
    steps: tuple[Step, ...] = field(default=(), metadata={"kinds": _step_kinds})
    deploy: DeploySettings | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise RecipeError(f"seed: {self.seed!r} is negative; give 0 or more")
        if self.train is not None:
            self._check_training(self.train)
        elif not self.model.has_weights and not isinstance(next(iter(self.steps), None), (Incubate, Elastic)):
            raise RecipeError(
                "train: is missing, and without model.weights, model.pretrained or model.checkpoint the weights would "
                "stay random; add a [train] table"
            )
        for index, step in enumerate(self.steps):
            if index and _trains(step) and any(_is_folding(earlier) for earlier in self.steps[:index]):
                raise RecipeError(
                    f"steps[{index}]: trains after branches or batch norms were merged; train first"
                )
            self._check_after_quantize(index, step)
            self._check_after_exits(index, step)
            self._check_after_elastic(index, step)
            if _is_folding(step) and step in self.steps[:index]:
                raise RecipeError(f"steps[{index}]: {step.kind} is done twice; remove one")
            if self.deploy is None and needs_timer(step):
                raise RecipeError(
                    f"steps[{index}]: {step.kind} has a goal in milliseconds or in shares of them, which a target "
                    'measures; add a [deploy] table with target = "edge-cpu"'
                )

    def _check_after_quantize(self, index: int, step: Step) -> None:
        """A rounded network can be trained, where its numbers are simulated in float32, and nothing else."""
        earlier = next((item for item in self.steps[:index] if isinstance(item, Quantize)), None)
        if earlier is None:
            return
        if isinstance(step, Quantize):
            raise RecipeError(f"steps[{index}]: quantize is done twice; remove one")
        if not isinstance(step, (Train, Distill)):
            raise RecipeError(f"steps[{index}]: {step.kind} comes after quantize; put quantize behind it")
        if earlier.precision not in TRAINABLE:
            raise RecipeError(
                f"steps[{index}]: trains after the network was quantized to {earlier.precision}, and only "
                f"{', '.join(TRAINABLE[:-1])} and {TRAINABLE[-1]} can be trained; train first"
            )

    def _check_after_exits(self, index: int, step: Step) -> None:
        """Heads read what blocks give, so blocks that change their shape behind them would break them."""
        earlier = [item for item in self.steps[:index] if isinstance(item, (EarlyExit, GlanceFocus))]
        if earlier and not isinstance(step, (Train, Distill)):
            kind = earlier[0].kind
            raise RecipeError(f"steps[{index}]: {step.kind} comes after {kind}; put {kind} behind it")

    def _check_after_elastic(self, index: int, step: Step) -> None:
        """Sub-nets share weights that only `Elastic` trains for all of them."""
        last = next(
            (item for item in reversed(self.steps[:index]) if isinstance(item, (Elastic, ExtractSubNet))),
            None,
        )
        if isinstance(last, Elastic) and isinstance(step, (Train, Distill, Tune)):
            raise RecipeError(
                f"steps[{index}]: {step.kind} comes after elastic, whose smaller sub-nets it would spoil; put an "
                "extract_subnet step between them"
            )

    def _check_training(self, train: Train) -> None:
        if train.epochs == 0 and train.ema > 0:
            raise RecipeError("train.ema: averages no weights when train.epochs is 0; set ema to 0 or train")
        if train.epochs == 0 and not self.model.has_weights:
            raise RecipeError(
                "train.epochs: is 0 and there are no model.weights; the weights would stay random"
            )
        if train.keep == "last" and train.patience > 0:
            raise RecipeError(
                "train.patience: stops past the best weights, but train.keep is 'last'; use keep = 'best'"
            )

    @property
    def phases(self) -> tuple[Step, ...]:
        """Everything that changes the model, in order: training, then the steps."""
        return self.steps if self.train is None else (self.train, *self.steps)

    def to_json(self) -> dict[str, Any]:
        """Every setting, defaults included, as plain JSON values; `parse_recipe` is its inverse."""
        values = cast(dict[str, Any], _plain(self))
        values["steps"] = [{"kind": step.kind, **_plain(step)} for step in self.steps]
        return values


def parse_recipe(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Check plain values and build the recipe.

    Raises:
        RecipeError: one line with the key's path.
    """
    return parse(Recipe, values, source)


def read_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from a TOML file, a run's `recipe.json`, or by name from the zoo (`digits`, `fashion-mnist`, …).

    Args:
        overrides: values by dotted key, such as {"train.epochs": 5}, laid over the file's.

    Raises:
        RecipeError: no such file, not TOML or JSON, or a mistake in it, with the key's path.
    """
    file = find_recipe(str(path))
    if file is None:
        raise RecipeError(
            f"no recipe {str(path)!r}; give a .toml file (`cveff recipe init` writes one), "
            f"or one of {', '.join(recipe_names())}"
        )
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:  # of either parser, or text that is none
        raise RecipeError(f"{file.name}: not valid {file.suffix[1:].upper()}: {error}") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from error
    return parse_recipe(with_overrides(values, overrides or {}), file.name)


def recipe_for(
    subject: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    epochs: int | None = None,
    budget: str | None = None,
) -> Recipe:
    """The recipe a user means: a file, a name in the zoo, or the defaults on a data set.

    Args:
        overrides: as for `read_recipe`.
        epochs: as `with_epochs`.
        budget: as `with_budget`.

    Raises:
        RecipeError: as `read_recipe`, both of them, or either for a recipe that does not train.
    """
    if subject.endswith((".toml", ".json")) or find_recipe(subject) is not None:
        recipe = read_recipe(subject, overrides)
    else:
        values = Recipe(data=DataSettings(subject), train=default_training(subject)).to_json()
        recipe = parse_recipe(with_overrides(values, overrides or {}), "command line")
    if epochs is None and budget is None:
        return recipe
    if epochs is not None and budget is not None:
        raise RecipeError("--epochs and --budget contradict each other; give one of them")
    if recipe.train is None:
        option = "--budget" if epochs is None else "--epochs"
        raise RecipeError(
            f"{subject}: train: is missing, so {option} has nothing to change; add a [train] table"
        )
    train = with_budget(recipe.train, budget) if epochs is None else with_epochs(recipe.train, epochs)  # type: ignore[arg-type]
    return dataclasses.replace(recipe, train=train)


def default_training(source: str, epochs: int | None = None, has_weights: bool = False) -> Train:
    """How to train on a data set without a recipe: a fair start, not a tuned one.

    Args:
        source: the data set; those known by name are small images, which a resized crop would blur.
        has_weights: the model starts from given weights, which a gentle rate keeps.
    """
    augmentation = Augmentation(flip="random", crop_padding=2)
    if source not in NAMED:
        augmentation = Augmentation(flip="random", min_scale=0.5)
    if has_weights:
        tuning = Train(
            epochs=10,
            batch_size=64,
            optimizer="adamw",
            learning_rate=3e-4,
            weight_decay=0.05,
            augmentation=augmentation,
        )
        return tuning if epochs is None else with_epochs(tuning, epochs)
    training = Train(
        epochs=30, batch_size=64, learning_rate=0.05, warmup_epochs=2.0, ema=0.99, augmentation=augmentation
    )
    return training if epochs is None else with_epochs(training, epochs)


def with_epochs(train: Train, epochs: int) -> Train:
    """`train` made longer or shorter, with the warm-up in proportion and without a budget.

    Raises:
        TrainingError: `epochs` is negative.
    """
    warmup = train.warmup_epochs * epochs / train.epochs if train.epochs else 0.0
    return dataclasses.replace(train, epochs=epochs, warmup_epochs=max(warmup, 0.0), budget=None)


def with_budget(train: Train, budget: str) -> Train:
    """`train` for a wall-clock time such as "10m", whatever stopped it before.

    Raises:
        TrainingError: `budget` is no time.
    """
    return dataclasses.replace(train, budget=budget, epochs=max(1, train.epochs), patience=0)


def with_assembly(recipe: Recipe, modules: int) -> Recipe:
    """`recipe` with its training done as Deep Incubation of this many modules; see `Incubate.of`.

    Raises:
        RecipeError: it does not train.
        StepError: `modules` is not positive.
    """
    if recipe.train is None:
        raise RecipeError("train: is missing, so --assemble has nothing to divide; add a [train] table")
    if recipe.train.budget is not None:
        raise RecipeError("train.budget: is for one training, and --assemble makes several; give epochs")
    return dataclasses.replace(recipe, train=None, steps=(Incubate.of(recipe.train, modules), *recipe.steps))


def find_recipe(name: str) -> Path | None:
    """The file of a recipe given by path or by its name in the zoo; None where there is none."""
    path = Path(name)
    if path.suffix in (".toml", ".json"):
        return path if path.is_file() else None
    return next((file for file in RECIPES.glob("*.toml") if file.stem == name), None)


def recipe_names() -> list[str]:
    """Names of the recipes that come with cveff."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def with_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` with each dotted key set.

    Raises:
        RecipeError: a part of the key is not a table.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key, value in overrides.items():
        *tables, last = key.split(".")
        here: dict[str, Any] = result
        for depth, table in enumerate(tables):
            here[table] = dict(here[table]) if isinstance(here.get(table), Mapping) else here.get(table, {})
            here = here[table]
            if not isinstance(here, dict):
                raise RecipeError(f"{'.'.join(tables[: depth + 1])}: is not a table, so {key} cannot be set")
        here[last] = value
    return result


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split `train.epochs=5` into the key and its value; what is not valid TOML is taken as a string.

    Raises:
        RecipeError: no `=`, or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text!r} is not KEY=VALUE, such as --set train.epochs=5")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _trains(step: Step) -> bool:
    if isinstance(step, (EarlyExit, GlanceFocus)):
        return step.train is not None
    return (
        isinstance(step, (Train, Distill, Tune, Incubate, Assemble, Elastic))
        or getattr(step, "recover", None) is not None
    )


def _is_folding(step: Step) -> bool:
    return isinstance(step, (Reparameterize, FoldBatchNorm))


def _plain(value: Any) -> Any:
    """JSON values of a dataclass; None is left out, as TOML has none."""
    if dataclasses.is_dataclass(value):
        items = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {name: _plain(inner) for name, inner in items.items() if inner is not None}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
