"""What docs/quantize.md shows runs as it stands there."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import cveff
from cveff import model_zoo
from cveff.cli import main
from cveff.compress import Quantize
from cveff.data import load
from cveff.recipe import parse_recipe

PAGE = (Path(__file__).parents[1] / "docs" / "quantize.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page's reader has: a saved model, and images without labels."""
    model = model_zoo.load("digits")
    cveff.save(model, tmp_path / "runs" / "photos")
    (tmp_path / "unlabelled").mkdir()
    images, _ = next(iter(load("digits").val.evaluation_batches(model.spec.input, 120)))
    for index, image in enumerate(images):
        Image.fromarray(image[:, :, 0]).save(tmp_path / "unlabelled" / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_recipes_are_right() -> None:
    (recipe,) = [parse_recipe(tomllib.loads(block)) for block in blocks("toml")]
    assert [step.kind for step in recipe.steps] == ["quantize", "distill"]


def test_every_setting_of_int8_is_on_the_page() -> None:
    for name in ("method", "equalize", "weights", "saturation", "scheme", "exclude", "images", "calibration"):
        assert name in Quantize.__dataclass_fields__ and name in PAGE


@pytest.mark.slow
def test_commands_run(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.partition("  #")[0].strip() for block in blocks("console") for line in block.splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert main([*shlex.split(line)[1:], "--quiet"]) == 0, capsys.readouterr().err
    assert (elsewhere / "runs" / "digits-int8" / "model.onnx").is_file()
    shown = [line.split("  ")[0].strip() for line in blocks("text")[0].splitlines() if line.strip()]
    printed = capsys.readouterr().out
    assert all(first in printed for first in shown), "the page shows the table as it is printed"


@pytest.mark.slow
def test_programs_run(elsewhere: Path) -> None:
    pytest.importorskip("nncf")
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "docs/quantize.md", "exec"), names)
    assert {"small.onnx", "model.int8.xml"} <= {path.name for path in elsewhere.iterdir()}
