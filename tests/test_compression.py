"""Compression as a whole: four steps and a bundle from one recipe, resumed anywhere, and the words that ask for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

import cveff
from cveff import pipeline
from cveff.compress import Distill, LowRank, Prune, Quantize, Sparsify
from cveff.compression import compression_recipe, default_folder, preview
from cveff.effects import Effects
from cveff.errors import CveffError, RecipeError, StepError
from cveff.export.bundle import validate
from cveff.export.timer import EngineTimer
from cveff.progress import Silent
from cveff.recipe import DeploySettings, ModelSettings, Recipe, parse_recipe
from cveff.train import Train

TARGET = """
name = "tiny"
description = "for tests"
candidates = [["onnxruntime", "fp32"], ["onnxruntime", "int8"]]
threads = 1
batch_sizes = [1]
"""
STEPS = [
    {"kind": "prune", "macs": 0.5, "importance": "magnitude", "sensitivity": False, "images": 64},
    {"kind": "low_rank", "energy": 0.3, "images": 32},
    {"kind": "distill", "train": {"epochs": 1, "augmentation": {"crop_padding": 1}}},
]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Prune, low rank and distil the zoo's digits model, then int8."""
    (tmp_path / "tiny.toml").write_text(TARGET)
    return parse_recipe(
        {
            "data": {"source": "digits"},
            "model": {"checkpoint": "digits"},
            "steps": STEPS,
            "deploy": {
                "target": str(tmp_path / "tiny.toml"),
                "max_accuracy_drop": 100.0,
                "num_calibration": 32,
            },
        }
    )


@pytest.fixture(autouse=True)
def timer(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Parameters in place of milliseconds, and which models were timed together."""
    asked: list[tuple[str, ...]] = []

    def milliseconds(self: EngineTimer, models: Mapping[str, cveff.Model]) -> dict[str, float]:
        asked.append(tuple(models))
        return {name: model.num_parameters / 1000 for name, model in models.items()}

    monkeypatch.setattr(EngineTimer, "milliseconds", milliseconds)
    return asked


@pytest.mark.slow
def test_one_recipe_prunes_factorises_distils_and_ships(recipe: Recipe, tmp_path: Path, timer) -> None:
    result = pipeline.run(recipe, out=tmp_path / "run")
    dense, *_, last = result.effects
    assert [effect.kind for effect in result.effects] == ["start", "prune", "low_rank", "distill"]
    assert timer[-1] == ("start", "0-prune", "1-low_rank", "2-distill"), "timed together, so comparable"
    assert dense.parameters == cveff.model_zoo.load("digits").num_parameters
    assert dense.macs is not None
    assert last.macs is not None
    assert last.macs <= 0.5 * dense.macs
    assert last.accuracy is not None
    assert last.accuracy > 0.9
    model = cveff.load(result.model)
    assert model.spec.edits[0].kind == "prune_channels"
    assert model.num_parameters == last.parameters
    data = cveff.data.load("digits")
    assert last.accuracy == pipeline.evaluate(model, dataclasses.replace(data, test=None)), (
        "choices see val only"
    )
    assert result.deployment is not None
    manifest = result.deployment.manifest
    validate(manifest)
    validate({key: value for key, value in manifest.items() if key != "steps"})  # as before there were steps
    assert [step["kind"] for step in manifest["steps"]] == ["start", "prune", "low_rank", "distill"]
    assert manifest["steps"][-1]["latency_ms"] == last.latency_ms
    assert {entry["precision"] for entry in manifest["candidates"]} == {"fp32", "int8"}
    page = (result.deployment.path / "report.html").read_text(encoding="utf-8")
    assert "What each step did" in page
    assert f"distill {last.latency_ms:.3g} ms" in page, "the plot says its figures in words too"
    assert parse_recipe(manifest["recipe"]) == recipe


def test_a_run_killed_between_steps_goes_on_and_ends_the_same(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    whole = pipeline.run(recipe, out=tmp_path / "whole", bundle=False)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distill, "__call__", stop)
        pipeline.run(recipe, out=out, bundle=False)
    record = json.loads((out / "effects.json").read_text())
    assert [step["name"] for step in record["steps"]] == ["start", "0-prune", "1-low_rank"]
    record["steps"].pop()  # as if killed after the model was saved and before it was scored
    (out / "effects.json").write_text(json.dumps(record))
    for step in (Prune, LowRank):
        monkeypatch.setattr(step, "__call__", stop)  # doing it again would be seen
    resumed = pipeline.run(recipe, out=out, resume=True, bundle=False)
    assert resumed.effects == whole.effects
    weights = [(result.model / "weights.safetensors").read_bytes() for result in (whole, resumed)]
    assert weights[0] == weights[1]
    elsewhere = dataclasses.replace(recipe, deploy=DeploySettings("edge-cpu"))
    assert pipeline.run(elsewhere, out=out, resume=True, bundle=False).effects == whole.effects
    assert json.loads((out / "effects.json").read_text())["timing"]["target"] == "edge-cpu", "timed again"


def test_a_damaged_record_is_said_and_measured_again(tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(Silent):
        def message(self, text: str) -> None:
            said.append(text)

    (tmp_path / "effects.json").write_text('{"steps": [{"name": "start"}]}')
    effects = Effects(tmp_path, lambda model: 0.5, Heard())
    assert len(said) == 1 and "effects.json is damaged" in said[0] and "measured again" in said[0]
    model = cveff.create("small_resnet_s", num_classes=2, image_size=8)
    effects.note("start", "start", model)
    assert (
        Effects(tmp_path, lambda model: 0.5, Silent())
        .complete({"start": "start"}, lambda _: model, None, None)[0]
        .parameters
        == model.num_parameters
    )


def test_what_a_step_lacks_is_said_before_any_is_done(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing may start")

    monkeypatch.setattr(Prune, "__call__", never)
    other = cveff.create("small_resnet_s", num_classes=3, image_size=8, channels=1)
    cveff.save(other, tmp_path / "other")
    late = dataclasses.replace(recipe, steps=(*recipe.steps[:2], Distill(teacher=str(tmp_path / "other"))))
    with pytest.raises(StepError, match="has 3 classes and the data 10"):
        pipeline.run(late, out=tmp_path / "run")
    nested = dataclasses.replace(recipe, steps=(Prune(macs=0.5, recover=Distill(teacher="resnet1888")),))
    with pytest.raises(CveffError, match="did you mean"):
        pipeline.run(nested, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_target_without_float32_times_nothing_and_says_so(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "int8.toml").write_text(TARGET.replace('["onnxruntime", "fp32"], ', ""))
    deploy = DeploySettings(str(tmp_path / "int8.toml"))
    prune = dataclasses.replace(recipe, steps=(recipe.steps[0],), deploy=deploy)
    result = pipeline.run(prune, out=tmp_path / "run", bundle=False)
    assert [effect.latency_ms for effect in result.effects] == [None, None]
    latency = dataclasses.replace(prune, steps=(LowRank(latency=0.5),))
    with pytest.raises(StepError, match="no fp32 candidate"):
        pipeline.run(latency, out=tmp_path / "other", bundle=False)


def test_a_checkpoint_brings_everything_but_its_classes_must_fit(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="architecture: comes from the checkpoint"):
        ModelSettings("resnet18", checkpoint="digits")
    cveff.save(cveff.create("small_resnet_s", num_classes=3, image_size=8, channels=1), tmp_path / "three")
    recipe = compression_recipe(str(tmp_path / "three"), prune="macs=0.5", data="digits")
    with pytest.raises(CveffError, match="the model has 3 classes but digits has 10"):
        pipeline.run(recipe, out=tmp_path / "run")


def test_words_become_steps_in_the_order_that_makes_sense() -> None:
    recipe = compression_recipe(
        "digits",
        distill="dist,epochs=3,learning_rate=5e-4",
        sparsify="0.7",
        low_rank="0.9",
        prune="macs=0.5,depth=true",
        quantize="int8,weights=learned",
    )
    prune, low_rank, sparsify, distill, quantize = recipe.steps
    assert quantize == Quantize(weights="learned")
    assert prune == Prune(macs=0.5, depth=True)
    assert low_rank == LowRank(latency=0.9)
    assert sparsify == Sparsify(pattern="unstructured", sparsity=0.7)
    assert isinstance(distill, Distill)
    assert (distill.method, distill.train.epochs, distill.train.learning_rate) == ("dist", 3, 5e-4)
    assert distill.train.augmentation.crop_padding == 1, "as the checkpoint was trained"
    assert recipe.data.source == "digits"
    assert parse_recipe(recipe.to_json()) == recipe
    default = compression_recipe("digits")
    assert default.steps[0] == Prune(latency=0.5)
    assert [step.kind for step in default.steps] == ["prune", "distill"]
    assert compression_recipe("digits", quantize="default").steps == (Quantize(),)
    lengths = [
        compression_recipe("digits", epochs=7).steps[-1],
        compression_recipe("digits", distill="epochs=7").steps[-1],
    ]
    assert lengths[0] == lengths[1]


def test_images_and_seed_are_those_of_the_training(tmp_path: Path) -> None:
    """Another seed splits validation images off that the checkpoint was trained on."""
    cveff.save(cveff.model_zoo.load("digits"), tmp_path / "run" / "model")
    made = Recipe(
        data=dataclasses.replace(compression_recipe("digits").data, val_fraction=0.2), train=Train(), seed=5
    )
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(made.to_json()))
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        recipe = compression_recipe(str(path))
        assert (recipe.data, recipe.seed) == (made.data, 5)
    assert compression_recipe(str(tmp_path / "run"), seed=2).seed == 2
    assert (
        default_folder("runs/digits/model/")
        == default_folder("runs/digits")
        == Path("runs/digits-compressed")
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"prune": "latency=1.5"}, r"--prune: prune.latency is 1.5; give a number between 0 and 1"),
        ({"prune": "latncy=0.5"}, r"--prune: latncy: unknown key; did you mean 'latency'"),
        ({"prune": "latency=fast"}, r"--prune: latency: 'fast' is not a number"),
        ({"prune": "latency="}, r"is not KEY=VALUE"),
        ({"prune": "latency=0.5,macs=0.5"}, r"one goal"),
        ({"low_rank": "2"}, r"low_rank.latency is 2"),
        ({"sparsify": "3:4"}, r"'3:4' is unknown"),
        ({"quantize": "int7"}, r"--quantize: precision: 'int7' is unknown; did you mean 'int8'"),
        ({"distill": "method=hints"}, r"--distill: method: 'hints' is unknown"),
        ({"distill": "epochs=3", "epochs": 4}, r"epochs=3 and --epochs 4 differ"),
    ],
)
def test_wrong_words_are_one_line(words: dict, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected) as caught:
        compression_recipe("digits", **words)
    assert "\n" not in str(caught.value)


def test_a_preview_shows_groups_and_writes_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "macs=0.5,importance=magnitude,sensitivity=false,images=64"
    shown = preview(compression_recipe("digits", prune=words))
    values = shown.to_json()
    assert 0 < values["after"]["macs"] <= 0.5 * values["before"]["macs"]
    assert values["after"]["latency_ms"] < values["before"]["latency_ms"]
    assert any(group["left"] < group["units"] for group in values["groups"].values())
    assert "output" in values["frozen"]["fc"]["reason"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecipeError, match="nothing is pruned; add --prune"):
        preview(compression_recipe("digits", distill="default"))
    with pytest.raises(StepError, match=r"cannot be reached.*is left"):
        preview(compression_recipe("digits", prune=words.replace("0.5", "0.001")))
