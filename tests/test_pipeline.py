"""The walk: the same recipe gives the same bits, a stopped run continues, a folder holds one run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cveff
from cveff import pipeline, run_folder
from cveff.backbones.fold import FoldBatchNorm
from cveff.data import load as load_data
from cveff.errors import CheckpointError, CveffError, RecipeError, TargetError
from cveff.recipe import DataSettings, DeploySettings, ModelSettings, parse_recipe
from cveff.train import Train


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 8×8 grey images, dark and bright."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, low in (("dark", 0), ("bright", 128)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(low, low + 128, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture
def recipe(images: Path):
    return parse_recipe(
        {
            "data": {"source": str(images)},
            "model": {"architecture": "small_resnet_s"},
            "train": {"epochs": 2, "batch_size": 8},
            "steps": [{"kind": "train", "epochs": 1, "batch_size": 16}],
        }
    )


def _weights(path: Path) -> bytes:
    return (path / "weights.safetensors").read_bytes()


def test_a_run_leaves_a_loadable_model_and_its_record(recipe, tmp_path) -> None:
    recipe = dataclasses.replace(recipe, steps=(FoldBatchNorm(),))
    result = pipeline.run(recipe, out=tmp_path / "run")
    model = cveff.load(result.model)
    assert model.spec.labels == ("bright", "dark")
    assert model.spec.input.size == (8, 8)
    assert model.spec.input.channels == 1
    assert [edit.kind for edit in model.spec.edits] == ["fold_batch_norm"]
    assert result.accuracy == pipeline.evaluate(model, load_data(recipe.data.source))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "effects.json",
        "model",
        "phases",
        "recipe.json",
        "train",
    ]


def test_the_same_recipe_gives_the_same_bits_and_another_seed_does_not(recipe, tmp_path) -> None:
    recipe = dataclasses.replace(recipe, steps=())
    once = pipeline.run(recipe, out=tmp_path / "once")
    again = pipeline.run(recipe, out=tmp_path / "again")
    other = pipeline.run(dataclasses.replace(recipe, seed=1), out=tmp_path / "other")
    assert _weights(once.model) == _weights(again.model) != _weights(other.model)


def test_a_stopped_run_continues_after_its_last_finished_phase(recipe, tmp_path, monkeypatch) -> None:
    recipe = dataclasses.replace(recipe, steps=(FoldBatchNorm(),))
    whole = pipeline.run(recipe, out=tmp_path / "whole")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FoldBatchNorm, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    (tmp_path / "run" / "phases" / ".1-fold_batch_norm.abc").mkdir()  # what a kill while saving leaves
    monkeypatch.setattr(Train, "__call__", stop)  # training again would be seen
    resumed = pipeline.run(recipe, out=tmp_path / "run", resume=True)
    assert _weights(resumed.model) == _weights(whole.model)
    assert [path.name for path in sorted((tmp_path / "run" / "phases").iterdir())] == [
        "0-train",
        "1-fold_batch_norm",
    ]


def test_resume_begins_where_there_is_nothing(recipe, tmp_path) -> None:
    assert pipeline.run(recipe, out=tmp_path / "run", resume=True).model.is_dir()


def test_a_folder_holds_one_run(recipe, tmp_path) -> None:
    short = dataclasses.replace(recipe, steps=())
    out = tmp_path / "run"
    pipeline.run(short, out=out)
    with pytest.raises(RecipeError, match="--resume continues it, --overwrite replaces it"):
        pipeline.run(short, out=out)
    other = dataclasses.replace(short, seed=1)
    with pytest.raises(RecipeError, match=r"another recipe \(seed was 0, is 1\)"):
        pipeline.run(other, out=out, resume=True)
    before = _weights(out / "model")
    pipeline.run(other, out=out, overwrite=True)
    assert _weights(out / "model") != before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_left_alone(recipe, tmp_path, overwrite) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="no run of cveff"):
        pipeline.run(recipe, out=tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RecipeError, match="existing file"):
        pipeline.run(recipe, out=tmp_path / "thesis.txt")


def test_a_damaged_record_is_said(recipe, tmp_path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        pipeline.run(recipe, out=tmp_path, resume=True)


def test_a_misspelt_target_is_found_before_anything_is_done(recipe, tmp_path) -> None:
    wrong = dataclasses.replace(recipe, deploy=DeploySettings(target="egde-cpu"))
    with pytest.raises(TargetError, match="egde-cpu"):
        pipeline.run(wrong, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_bundle_is_kept_on_resume_and_remade_for_other_settings(
    recipe, tmp_path, monkeypatch
) -> None:
    """The engine work is replaced: only what the pipeline asks for, and when, is looked at."""
    from cveff.export import deploy as deploy_module
    from cveff.files import write_json

    asked: list[dict] = []

    def fake(model, **settings):
        asked.append(settings)
        settings["out"].mkdir(parents=True, exist_ok=True)
        write_json(settings["out"] / "manifest.json", {"recipe": settings["recipe"]})
        return deploy_module.Deployment(settings["out"], {"recipe": settings["recipe"]})

    monkeypatch.setattr(deploy_module, "deploy", fake)
    deployed = dataclasses.replace(recipe, steps=(), deploy=DeploySettings(max_accuracy_drop=2.0))
    out = tmp_path / "run"
    first = pipeline.run(deployed, out=out)
    assert first.deployment is not None
    assert first.deployment.path == out / "model.bundle"
    assert asked[0]["max_accuracy_drop"] == 2.0
    assert parse_recipe(asked[0]["recipe"]) == deployed
    again = pipeline.run(deployed, out=out, resume=True)
    assert len(asked) == 1
    assert again.to_json() == first.to_json()
    pipeline.run(dataclasses.replace(deployed, deploy=DeploySettings()), out=out, resume=True)
    assert [settings["max_accuracy_drop"] for settings in asked] == [2.0, 1.0]


def test_the_input_follows_the_images(images) -> None:
    data = load_data(str(images))
    small = pipeline.create_for(ModelSettings(), data)
    assert small.spec.architecture == "small_resnet_s"
    assert (small.spec.input.size, small.spec.input.crop, small.spec.input.enlarge) == ((8, 8), 1.0, False)
    assert 0.4 < small.spec.input.mean[0] < 0.6  # the data's, half dark and half bright
    larger = pipeline.create_for(ModelSettings("small_resnet_s", image_size=(16, 12), channels=3), data)
    assert (larger.spec.input.size, larger.spec.input.channels) == ((16, 12), 3)
    assert larger.spec.input.enlarge
    kept = pipeline.create_for(ModelSettings("small_resnet_s", image_size=16, enlarge=False), data)
    assert not kept.spec.input.enlarge


def test_initial_weights_depend_on_the_seed_alone(images) -> None:
    data = load_data(str(images))
    states = [pipeline.create_for(ModelSettings(), data, seed=seed).module.state_dict() for seed in (0, 0, 1)]
    name = "stem.conv.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": DataSettings("absent/")}, "absent"),
        ({"model": ModelSettings("small_resnet_x")}, "small_resnet_s"),
        ({"model": ModelSettings("small_resnet_s", weights=Path("absent.pth"))}, "absent.pth does not exist"),
        ({"model": ModelSettings("small_resnet_s", arguments={"wings": 2})}, "wings"),
    ],
)
def test_what_cannot_be_built_is_said(recipe, tmp_path, change, expected) -> None:
    with pytest.raises(CveffError, match=expected):
        pipeline.run(dataclasses.replace(recipe, **change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists(), "the corrected command must not find a run there"


@dataclasses.dataclass(frozen=True)
class _Watch:
    """A step for tests: note the teacher's first weights, then stop if asked."""

    seen: list[torch.Tensor]
    stop: bool = False
    kind: ClassVar[str] = "watch"
    requires: ClassVar[tuple[str, ...]] = ("teacher",)

    def __call__(self, model: cveff.Model, run: cveff.Run) -> cveff.Model:
        assert run.teacher is not None
        self.seen.append(next(run.teacher.module.parameters()).detach().clone())
        if self.stop:
            raise CveffError("stopped")
        return model


@pytest.mark.parametrize("trained", [True, False])
def test_the_teacher_is_what_the_last_training_left_also_after_a_stop(
    recipe, tmp_path, monkeypatch, trained
) -> None:
    monkeypatch.setattr(pipeline.Recipe, "to_json", lambda self: {"seed": self.seed})
    monkeypatch.setattr(run_folder, "parse_recipe", lambda values, source: recipe)
    seen: list[torch.Tensor] = []
    out = tmp_path / "run"
    steps = (FoldBatchNorm(), _Watch(seen, stop=True))
    recipe = dataclasses.replace(recipe, steps=steps)
    if not trained:
        parent = cveff.create("small_resnet_s", num_classes=2, image_size=8, channels=1)
        save_file(parent.module.state_dict(), tmp_path / "parent.safetensors")
        model = dataclasses.replace(recipe.model, weights=tmp_path / "parent.safetensors")
        recipe = dataclasses.replace(recipe, train=None, model=model)
    with pytest.raises(CveffError, match="stopped"):
        pipeline.run(recipe, out=out)
    recipe = dataclasses.replace(recipe, steps=(FoldBatchNorm(), _Watch(seen)))  # the same to the folder
    pipeline.run(recipe, out=out, resume=True)
    expected = cveff.load(out / "phases" / "0-train") if trained else parent
    first = next(expected.module.parameters())
    assert len(seen) == 2
    assert all(torch.equal(weights, first) for weights in seen)
