"""`cveff compress`: words to a smaller model and a table; every wrong word is one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

import cveff
from cveff.cli import main
from cveff.cli.compress import PRECISIONS, with_values
from cveff.compress import prune_plan
from cveff.compress.quantize import Precision

QUICK = "macs=0.5,importance=magnitude,sensitivity=false,images=64"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_zoo_card_gets_smaller_and_the_table_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", "digits", "--prune", QUICK, "--epochs", "1", "--quiet"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [step["kind"] for step in result["steps"]] == ["start", "prune", "distill"]
    assert cveff.load(result["model"]).num_parameters == result["steps"][-1]["parameters"]
    assert result["out"] == "runs/digits-compressed"
    assert main(words) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0  # all is done: only the table is printed again
    table = capsys.readouterr().out
    for expected in (
        "dense",
        "prune",
        "distill",
        "accuracy (val)",
        "MACs",
        "parameters",
        "× the dense model's",
    ):
        assert expected in table


def test_a_plan_is_a_table_and_nothing_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compress", "digits", "--prune", QUICK, "--plan", "--quiet"]) == 0
    out = capsys.readouterr().out
    for expected in ("stem.conv", "stays as it is", "it is the network's output", "dense", "pruned"):
        assert expected in out
    assert list(tmp_path.iterdir()) == []


def test_options_may_stand_alone() -> None:
    assert with_values(["compress", "a", "--prune", "--low-rank", "0.8", "--distill", "--data", "x"]) == [
        "compress", "a", "--prune=default", "--low-rank", "0.8", "--distill=default", "--data", "x"
    ]  # fmt: skip
    assert with_values(["compress", "a", "--sparsify", "2:4", "--distill", "method=dist"])[2:] == [
        "--sparsify", "2:4", "--distill", "method=dist"
    ]  # fmt: skip
    assert with_values(["compress", "a", "--quantize", "int8-weights", "--quantize", "b"])[2:] == [
        "--quantize", "int8-weights", "--quantize=default", "b"
    ]  # fmt: skip
    assert get_args(Precision) == PRECISIONS
    assert with_values(["compress", "--distill", "runs/a"]) == ["compress", "--distill=default", "runs/a"]
    assert with_values(["compress", "a", "--prune"]) == ["compress", "a", "--prune=default"]
    assert with_values(["run", "a", "--prune"]) == ["run", "a", "--prune"]
    assert with_values([]) == []


def _fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["compress", *words, "--quiet"]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert not list(Path().glob("runs/*")), "the corrected command must not find a run there"
    return line


def test_bad_inputs_are_one_line_each(capsys, tmp_path: Path, monkeypatch) -> None:
    cveff.save(cveff.create("small_resnet_s", num_classes=3, image_size=8, channels=1), tmp_path / "three")
    (tmp_path / "empty").mkdir()
    wanted = ("digits", "--prune")
    least = _fails(capsys, *wanted, QUICK.replace("0.5", "0.001"))
    assert "cannot be reached" in least
    assert "is left" in least, "it says what can be"
    assert "has 3 classes and the data 10" in _fails(capsys, *wanted, QUICK, "--distill", "teacher=three")
    assert "empty" in _fails(capsys, *wanted, QUICK, "--data", "empty")
    assert "give --data" in _fails(capsys, "three", "--prune", QUICK)
    assert "is not a saved model" in _fails(capsys, "empty", "--prune", QUICK, "--data", "digits")
    analyze = prune_plan.analyze
    monkeypatch.setattr(prune_plan, "analyze", lambda *given: dataclasses.replace(analyze(*given), groups=()))
    assert "has no channels that could be pruned" in _fails(capsys, *wanted, QUICK, "--plan")
