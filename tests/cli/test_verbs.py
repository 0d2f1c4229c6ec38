"""What each verb does when all is well: files where they were asked for, JSON alone on stdout, help with an example."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

import cveff
from cveff.cli import app, main
from cveff.recipe import parse_recipe, recipe_names
from cveff.runtime.engines import available_engines
from cveff.target import load_target, target_names


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What a command that must succeed prints with --json."""
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _commands(command: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    inner = getattr(command, "commands", {})
    return [(path, command)] + [found for name in inner for found in _commands(inner[name], (*path, name))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights, for grey 8×8 images of three classes."""
    path = tmp_path_factory.mktemp("saved") / "net"
    cveff.save(cveff.create("small_resnet_s", labels=("a", "b", "c"), image_size=8, channels=1), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 8×8 grey images."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in "abc":
            (root / split / label).mkdir(parents=True)
            for index in range(4):
                pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{index}.png")
    return root


@pytest.mark.parametrize("path", [path for path, _ in _commands(typer.main.get_command(app))], ids=" ".join)
def test_every_help_has_an_example(path: tuple[str, ...], capsys) -> None:
    assert main([*path, "--help"]) == 0
    out = capsys.readouterr().out
    assert "xample" in out
    assert f"cveff {' '.join(path)}".strip() in " ".join(out.split())


def test_every_option_is_described() -> None:
    missing = [
        (path, parameter.name)
        for path, command in _commands(typer.main.get_command(app))
        for parameter in command.params
        if parameter.name != "help" and not parameter.help
    ]
    assert not missing


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cveff {cveff.__version__}\n"


def test_train_saves_and_says_where(capsys, images, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", str(images), "--epochs", "1", "--set", "train.augmentation.min_scale=1.0", "--quiet"]
    result = _json(capsys, *words, "--seed", "3")
    assert result["model"] == "runs/images0/model" or Path(result["model"]).is_dir()
    assert cveff.load(result["model"]).spec.labels == ("a", "b", "c")
    assert result["bundle"] is None
    assert result["count"] == 12
    record = json.loads((Path(result["out"]) / "recipe.json").read_text())
    assert (record["seed"], record["train"]["epochs"]) == (3, 1)
    assert main(words) == 2, "an earlier run is not touched"
    assert "--resume" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_deploy_hands_over_what_was_asked(capsys, saved, images, tmp_path, monkeypatch) -> None:
    """The engine work is replaced; the real thing is tested where it lives, and end to end below."""
    from cveff.export import deploy as room

    asked: dict[str, Any] = {}

    def fake(model, **settings):
        asked.update(settings, model=model)
        return room.Deployment(Path(settings["out"]), {"candidates": []})

    monkeypatch.setattr(room, "deploy", fake)
    words = [
        "--data",
        str(images),
        "--max-accuracy-drop",
        "0.5",
        "--target",
        "server-cpu",
        "--out",
        "my.bundle",
    ]
    result = _json(capsys, "deploy", str(saved), *words, "--num-calibration", "7", "--seed", "5")
    assert result["path"] == "my.bundle"
    assert asked["model"].spec == cveff.load(saved).spec
    assert {key: asked[key] for key in ("max_accuracy_drop", "target", "num_calibration", "seed")} == {
        "max_accuracy_drop": 0.5,
        "target": "server-cpu",
        "num_calibration": 7,
        "seed": 5,
    }
    assert asked["data"].labels == ("a", "b", "c")
    # An architecture with a weights file takes its classes from the file, or its names from the data.
    weights = saved / "weights.safetensors"
    start = ["small_resnet_s", "--weights", str(weights), "--channels", "1", "--image-size", "8"]
    _json(capsys, "deploy", *start, "--calibration", str(images), "--out", "my.bundle")
    assert asked["model"].spec.labels == ("0", "1", "2")
    assert asked["calibration"] == images
    _json(capsys, "deploy", *start, "--data", str(images), "--out", "my.bundle")
    assert asked["model"].spec.labels == ("a", "b", "c")
    # Without weights it is trained first; the run's folder keeps the model.
    monkeypatch.chdir(tmp_path)
    _json(capsys, "deploy", "small_resnet_s", "--data", str(images), "--epochs", "1", "--image-size", "8")
    assert asked["recipe"]["train"]["epochs"] == 1
    assert str(asked["out"]) == "small_resnet_s.bundle"
    assert cveff.load("runs/small_resnet_s/model").spec == asked["model"].spec


def test_export_writes_a_file_that_agrees(capsys, saved, tmp_path) -> None:
    from cveff.measure.predictor import torch_predictor
    from cveff.runtime.engines import open_file

    path = tmp_path / "net.onnx"
    result = _json(capsys, "export", str(saved), "--out", str(path))
    assert result["bytes"] == path.stat().st_size
    batch = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    expected = torch_predictor(cveff.load(saved))(batch)
    found = open_file("onnxruntime", path, threads=1)(batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_export_for_a_target_says_what_its_tensorrt_takes(capsys, saved, tmp_path) -> None:
    path = tmp_path / "net.onnx"
    words = ["export", str(saved), "--out", str(path), "--opset", "21", "--check", "--target"]
    assert _json(capsys, *words, "rtx")["findings"] == []
    assert main([*words, "jetson-orin", "--json"]) == 2
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["rule"], finding["severity"]) == ("opset", "fails")
    assert path.is_file()
    path.unlink()
    assert main([*words, "edge-cpu"]) == 2
    assert "no tensorrt candidate" in capsys.readouterr().err and not path.exists()


def test_check_reads_any_file(capsys, tiny_onnx) -> None:
    assert _json(capsys, "check", str(tiny_onnx), "--target", "server-gpu")["findings"] == []
    assert main(["check", str(tiny_onnx), "--target", "jetson-orin-dla"]) == 0, "what is slow is no failure"
    assert "DLA computes in float16" in capsys.readouterr().out
    assert main(["check", "absent.onnx"]) == 2
    assert "absent.onnx is not a readable ONNX file" in capsys.readouterr().err


def test_bench_and_verify(capsys, tiny_onnx, tiny_bundle) -> None:
    words = ["--batch", "1", "--batch", "3", "--rounds", "2", "--no-memory", "--threads", "1"]
    figures = _json(capsys, "bench", str(tiny_onnx), str(tiny_bundle), *words)
    assert [(entry["batch"], entry["kind"]) for entry in figures] == [
        (1, "onnx"),
        (1, "bundle"),
        (3, "onnx"),
        (3, "bundle"),
    ]
    assert main(["bench", str(tiny_onnx), *words]) == 0
    assert "model.onnx" in capsys.readouterr().out
    assert _json(capsys, "verify", str(tiny_bundle), "--against", str(tiny_onnx))["ok"]
    damaged = tiny_bundle / "model.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    assert main(["verify", str(tiny_bundle)]) == 2
    assert "not verified" in capsys.readouterr().out


def test_run_classifies(capsys, tiny_bundle, tmp_path) -> None:
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(image)
    result = _json(capsys, "run", str(tiny_bundle), str(image))
    assert len(result["images"]) == 1


def test_models(capsys) -> None:
    found = _json(capsys, "models", "--filter", "small_resnet*")
    assert found["architectures"] == ["small_resnet_m", "small_resnet_s"]
    assert "resnet18" in _json(capsys, "models", "resnet1")["architectures"]
    assert main(["models"]) == 0
    assert "efficientnet_lite0" in capsys.readouterr().out
    assert main(["models", "no such thing"]) == 0
    assert capsys.readouterr().out == ""


def test_targets(capsys) -> None:
    listed = {target["name"]: target for target in _json(capsys, "targets")}
    assert list(listed) == target_names()
    assert listed["rtx"]["obstacles"][0].startswith("does not run") == ("tensorrt" not in available_engines())
    assert main(["targets"]) == 0
    shown = capsys.readouterr().out
    assert "tensorrt: fp32, bf16, fp16, int8, fp8" in shown and "runs them" in shown


@pytest.mark.parametrize("name", target_names())
def test_a_shown_target_is_a_file_of_the_same_target(capsys, tmp_path, name: str) -> None:
    assert main(["targets", "show", name]) == 0
    path = tmp_path / "mine.toml"
    path.write_text(capsys.readouterr().out)
    assert load_target(path) == load_target(name)
    assert main(["targets", "show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensorrt"]["batches"] == list(
        load_target(name).tensorrt.batches
    )


def test_recipe_verbs(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", "init", "--data", "photos/", "--model", "resnet18"]) == 0
    assert main(["recipe", "check", "recipe.toml"]) == 0
    capsys.readouterr()
    shown = _json(capsys, "recipe", "show", "recipe.toml", "--set", "seed=4")
    recipe = parse_recipe(shown)
    assert (recipe.data.source, recipe.model.architecture, recipe.seed) == ("photos/", "resnet18", 4)
    assert main(["recipe", "show", "recipe.toml", "--set", "seed=4"]) == 0
    assert parse_recipe(tomllib.loads(capsys.readouterr().out)) == recipe
    assert _json(capsys, "recipe", "show") == recipe_names()
    assert main(["recipe", "init"]) == 2, "never overwritten"


def test_the_reference_is_what_the_code_says() -> None:
    import subprocess
    import sys

    script = Path(__file__).parents[2] / "tools" / "cli_reference.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_from_images_to_an_answer(capsys, tmp_path) -> None:
    """The main job end to end on one engine: train, deploy, verify, classify."""
    target = tmp_path / "small.toml"
    target.write_text(
        'name = "small"\ndescription = "one engine"\ncandidates = [["onnxruntime", "fp32"], ["onnxruntime", "int8"]]\n'
        "threads = 1\nbatch_sizes = [1]\n"
    )
    out = tmp_path / "run"
    words = [
        "--epochs",
        "3",
        "--target",
        str(target),
        "--set",
        "deploy.max_accuracy_drop=5.0",
        "--out",
        str(out),
    ]
    result = _json(capsys, "train", "digits", *words)
    assert result["accuracy"] > 0.5
    assert sum(entry["chosen"] for entry in result["manifest"]["candidates"]) == 1
    assert parse_recipe(result["manifest"]["recipe"]).train.epochs == 3
    assert _json(capsys, "verify", result["bundle"], "--data", "digits", "--against", str(out))["ok"]
    image = tmp_path / "digit.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(image)
    answer = _json(capsys, "run", result["bundle"], str(image))
    assert len(answer["images"][0]["predictions"]) == 5
