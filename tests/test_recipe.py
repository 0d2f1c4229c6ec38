"""Recipes: what is right survives a round trip, what is wrong is named by its key's path."""

from __future__ import annotations

import dataclasses
import json
import tomllib

import pytest

from cveff.compress import Distill
from cveff.data.augment import Augmentation
from cveff.errors import CveffError, RecipeError, TrainingError
from cveff.recipe import (
    DataSettings,
    DeploySettings,
    ModelSettings,
    Recipe,
    default_training,
    parse_assignment,
    parse_recipe,
    read_recipe,
    recipe_for,
    recipe_names,
    with_epochs,
    with_overrides,
)
from cveff.recipe_text import commented, to_toml, write_new
from cveff.schema import descriptions, nested
from cveff.train import Train

BASE = {"data": {"source": "digits"}, "train": {}}

MISTAKES = [
    ({"trian": {}}, "r.toml: trian: unknown key; did you mean 'train'?"),
    ({"train.epoch": 3}, "r.toml: train.epoch: unknown key; did you mean 'epochs'?"),
    ({"train.zzz": 3}, "r.toml: train.zzz: unknown key; known: epochs, batch_size"),
    (
        {"train.augmentation.flips": "x"},
        "r.toml: train.augmentation.flips: unknown key; did you mean 'flip'?",
    ),
    ({"train.epochs": "ten"}, "r.toml: train.epochs: 'ten' is not an integer"),
    ({"train.epochs": 2.5}, "r.toml: train.epochs: 2.5 is not an integer"),
    ({"train.epochs": True}, "r.toml: train.epochs: true is not an integer"),
    ({"train.epochs": "ten", "seed": "x"}, "(and 1 more)"),
    ({"train.epochs": -1}, "r.toml: train.epochs is -1; give 0 or more"),
    ({"train.learning_rate": float("nan")}, "r.toml: train.learning_rate: nan is not a finite number"),
    ({"train.learning_rate": "fast"}, "r.toml: train.learning_rate: 'fast' is not a number"),
    ({"train.optimizer": "adam"}, "r.toml: train.optimizer: 'adam' is unknown; did you mean 'adamw'?"),
    (
        {"train.augmentation.flip": "x"},
        "r.toml: train.augmentation.flip: 'x' is unknown; known: none, random",
    ),
    ({"train.augmentation.erasing": 2.0}, "r.toml: train.augmentation.erasing is 2.0; give a probability"),
    ({"train.batch_size": 10, "train.accumulation": 3}, "r.toml: train.accumulation 3 does not divide"),
    ({"train": 3}, "r.toml: train: 3 is not a table"),
    ({"data": {}}, "r.toml: data.source: is missing"),
    ({"data.source": ""}, "r.toml: data.source: is empty"),
    ({"data.val_fraction": 1.0}, "r.toml: data.val_fraction: 1.0 does not lie between 0 and 1"),
    ({"data.on_bad_image": "ignore"}, "r.toml: data.on_bad_image: 'ignore' is unknown; known: error, skip"),
    ({"model.channels": 2}, "r.toml: model.channels: 2 is unknown; known: 1, 3"),
    ({"model.image_size": 0.5}, "r.toml: model.image_size: 0.5 is not an integer or an array"),
    (
        {"model.image_size": [1, 2, 3]},
        "r.toml: model.image_size: [1, 2, 3] is not an integer or an array of 2",
    ),
    ({"model.image_size": 0}, "r.toml: model.image_size: 0 is not a positive number of pixels"),
    ({"model.pretrained": "yes"}, "r.toml: model.pretrained: 'yes' is not true or false"),
    ({"model.pretrained": True, "model.weights": "a.pth"}, "r.toml: model.pretrained: cannot be combined"),
    ({"model.arguments.num_classes": 3}, "r.toml: model.arguments.num_classes: is set from the data"),
    ({"steps": 3}, "r.toml: steps: 3 is not an array"),
    ({"steps": [3]}, "r.toml: steps[0]: 3 is not a table"),
    ({"steps": [{}]}, "r.toml: steps[0]: kind is missing; known: reparameterize, fold_batch_norm, train"),
    ({"steps": [{"kind": "prunes"}]}, "r.toml: steps[0].kind: 'prunes' is unknown; did you mean 'prune'?"),
    (
        {"steps": [{"kind": "train", "epohs": 1}]},
        "r.toml: steps[0].epohs: unknown key; did you mean 'epochs'?",
    ),
    ({"steps": [{"kind": "prune", "latency": 0.5}]}, "r.toml: steps[0]: prune has a goal in milliseconds"),
    ({"steps": [{"kind": "low_rank", "latency": 0.5}]}, 'add a [deploy] table with target = "edge-cpu"'),
    (
        {"steps": [{"kind": "prune", "macs": 0.5, "recover": {"train": {"epochs": "x"}}}]},
        "r.toml: steps[0].recover.train.epochs: 'x' is not an integer",
    ),
    (
        {"steps": [{"kind": "reparameterize"}, {"kind": "prune", "macs": 0.5, "recover": {}}]},
        "r.toml: steps[1]: trains after branches or",
    ),
    ({"model.checkpoint": "a", "model.architecture": "b"}, "architecture: comes from the checkpoint"),
    ({"steps": [{"kind": "train", "epochs": -1}]}, "r.toml: steps[0]: train.epochs is -1; give 0 or more"),
    (
        {"steps": [{"kind": "fold_batch_norm"}, {"kind": "train"}]},
        "r.toml: steps[1]: trains after branches or",
    ),
    ({"steps": [{"kind": "quantize"}] * 2}, "r.toml: steps[1]: quantize is done twice; remove one"),
    (
        {"steps": [{"kind": "quantize"}, {"kind": "prune", "macs": 0.5}]},
        "r.toml: steps[1]: prune comes after quantize; put quantize behind it",
    ),
    (
        {"steps": [{"kind": "quantize", "precision": "fp16"}, {"kind": "train"}]},
        "r.toml: steps[1]: trains after the network was quantized to fp16, and only int8, auto and fp8 can be trained",
    ),
    ({"steps": [{"kind": "quantize", "scheme": "x"}]}, "r.toml: steps[0].scheme: 'x' is unknown; known: cpu"),
    (
        {"steps": [{"kind": "quantize", "images": 0}]},
        "r.toml: steps[0]: quantize.images is 0; give 1 or more",
    ),
    ({"steps": [{"kind": "fold_batch_norm"}] * 2}, "r.toml: steps[1]: fold_batch_norm is done twice"),
    ({"deploy.max_accuracy_drop": -1}, "r.toml: deploy.max_accuracy_drop: -1.0 is not a number of points"),
    ({"deploy.num_calibration": 0}, "r.toml: deploy.num_calibration: 0 is not a positive number"),
    ({"seed": -1}, "r.toml: seed: -1 is negative"),
    ({"train.epochs": 0}, "r.toml: train.epochs: is 0 and there are no model.weights"),
    (
        {"train.epochs": 0, "train.ema": 0.9, "model.weights": "a.pth"},
        "r.toml: train.ema: averages no weights",
    ),
    ({"train.keep": "last", "train.patience": 3}, "r.toml: train.patience: stops past the best weights"),
]


@pytest.mark.parametrize(("overrides", "expected"), MISTAKES, ids=[str(changes) for changes, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_key(overrides: dict, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(with_overrides(BASE, overrides), "r.toml")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_without_training_and_without_weights_nothing_would_be_learned() -> None:
    with pytest.raises(RecipeError, match=r"^r: train: is missing"):
        parse_recipe({"data": {"source": "digits"}}, "r")
    assert parse_recipe({"data": {"source": "digits"}, "model": {"weights": "a.pth"}}).train is None


FULL = Recipe(
    data=DataSettings("photos/", "skip", 0.2),
    model=ModelSettings("resnet18", (32, 48), 1, True, {"drop_rate": 0.1, "note": 'a "b" é 😀 \x7f \\'}),
    train=Train(epochs=3, learning_rate=1e-3, augmentation=Augmentation(flip="random", mixup=0.2)),
    steps=parse_recipe(
        {**BASE, "steps": [{"kind": "train", "epochs": 1}, {"kind": "fold_batch_norm"}]}
    ).steps,
    deploy=DeploySettings(max_accuracy_drop=0.5),
    seed=7,
)


def test_json_and_toml_round_trips_are_exact() -> None:
    assert parse_recipe(FULL.to_json()) == FULL
    text = to_toml(FULL.to_json())
    assert parse_recipe(tomllib.loads(text)) == FULL


def test_a_partial_inner_table_keeps_the_outer_default() -> None:
    recipe = parse_recipe(with_overrides(BASE, {"train.augmentation.mixup": 0.3}))
    assert recipe.train == Train(augmentation=dataclasses.replace(Augmentation(), mixup=0.3))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_zoo_is_valid_and_deploys(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.deploy is not None
    assert parse_recipe(recipe.to_json()) == recipe


@pytest.mark.parametrize("source", ["digits", "fashion-mnist", "some/folder", 'odd "name" \\ é'])
def test_the_commented_recipe_means_the_default_one(source: str) -> None:
    recipe = parse_recipe(tomllib.loads(commented(source, "resnet18")))
    expected = recipe_for(source, {"model.architecture": "resnet18"})
    assert dataclasses.replace(recipe, deploy=None) == dataclasses.replace(expected, deploy=None)


def test_the_commented_recipe_comments_every_key_truly() -> None:
    """Uncommenting any `# key = default` line changes nothing."""
    text = commented("some/folder")
    recipe = parse_recipe(tomllib.loads(text))
    lines = text.splitlines()
    hidden = [index for index, line in enumerate(lines) if line.startswith("# ") and " = " in line]
    tried = 0
    for index in hidden:
        if lines[index].endswith("= …") or "kind = " in lines[index]:
            continue
        changed = [*lines[:index], lines[index].removeprefix("# "), *lines[index + 1 :]]
        try:
            values = tomllib.loads("\n".join(changed))
        except tomllib.TOMLDecodeError:  # a sentence with an equals sign, such as (mean = std)
            continue
        assert parse_recipe(values) == recipe, lines[index]
        tried += 1
    assert tried > 15


@pytest.mark.parametrize(
    "settings", [Recipe, ModelSettings, DataSettings, DeploySettings, Train, *nested(Train).values()]
)
def test_every_setting_is_described(settings: type) -> None:
    missing = {item.name for item in dataclasses.fields(settings)} - descriptions(settings).keys()
    assert not missing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=5", ("train.epochs", 5)),
        ("a=0.5", ("a", 0.5)),
        ("a=true", ("a", True)),
        ("a=[1, 2]", ("a", [1, 2])),
        ("data.source=fashion-mnist", ("data.source", "fashion-mnist")),
        ('a="5"', ("a", "5")),
        ("a=x=y", ("a", "x=y")),
    ],
)
def test_assignments(text: str, expected: tuple) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["train.epochs", "=5", ""])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        parse_assignment(text)


def test_overrides_leave_the_original_alone_and_stop_at_what_is_no_table() -> None:
    values = {"a": {"b": 1}}
    assert with_overrides(values, {"a.c": 2, "d.e.f": 3}) == {"a": {"b": 1, "c": 2}, "d": {"e": {"f": 3}}}
    assert values == {"a": {"b": 1}}
    with pytest.raises(RecipeError, match=r"a\.b: is not a table"):
        with_overrides(values, {"a.b.c": 1})


def test_more_or_fewer_epochs_keep_the_warm_up_in_proportion() -> None:
    train = Train(epochs=30, warmup_epochs=2.0)
    assert with_epochs(train, 15) == Train(epochs=15, warmup_epochs=1.0)
    assert with_epochs(train, 0).epochs == 0
    with pytest.raises(TrainingError):
        with_epochs(train, -1)
    recipe = recipe_for("digits", epochs=1)
    assert recipe.train is not None
    assert recipe.train.epochs == 1


def test_default_training_is_gentler_on_given_weights() -> None:
    assert (
        default_training("x", has_weights=True).peak_learning_rate < default_training("x").peak_learning_rate
    )
    assert default_training("digits").augmentation.min_scale == 1.0


def test_files_that_are_no_recipe(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'absent\.toml'"):
        read_recipe("absent.toml")
    with pytest.raises(RecipeError, match="one of digits"):
        read_recipe("absent")
    broken = tmp_path / "broken.toml"
    broken.write_text("epochs =")
    with pytest.raises(RecipeError, match=r"^broken.toml: not valid TOML"):
        read_recipe(broken)
    broken.write_bytes(b"a = '\xff'")
    with pytest.raises(RecipeError, match="not valid TOML"):
        read_recipe(broken)


def test_a_written_recipe_is_never_overwritten(tmp_path) -> None:
    path = tmp_path / "recipe.toml"
    write_new(path, "a = 1\n")
    with pytest.raises(CveffError, match="exists already"):
        write_new(path, "b = 1\n")
    assert path.read_text() == "a = 1\n"


def test_tables_within_steps_keep_what_they_do_not_name() -> None:
    text = """
    data.source = "digits"
    model.checkpoint = "digits"
    deploy.target = "edge-cpu"
    [[steps]]
    kind = "prune"
    latency = 0.5
    recover = { method = "dist", train = { epochs = 3 } }
    [[steps]]
    kind = "prune"
    macs = 0.5
    [steps.recover.train]
    epochs = 4
    """
    recipe = parse_recipe(tomllib.loads(text))
    first, second = recipe.steps
    assert (first.recover.method, first.recover.train.epochs) == ("dist", 3)
    assert second.recover == dataclasses.replace(
        Distill(), train=dataclasses.replace(Distill().train, epochs=4)
    )
    assert parse_recipe(tomllib.loads(to_toml(recipe.to_json()))) == recipe


def test_a_runs_record_is_a_recipe(tmp_path) -> None:
    recipe = read_recipe("digits")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    assert read_recipe(tmp_path / "recipe.json") == recipe
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(RecipeError, match="not valid JSON"):
        read_recipe(tmp_path / "recipe.json")
