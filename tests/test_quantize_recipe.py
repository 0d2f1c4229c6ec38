"""`quantize` among a recipe's steps: training behind it is quantization-aware, and the file is what was trained."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import cveff
from cveff import pipeline
from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.compress.quant.network import is_quantized
from cveff.data import load
from cveff.recipe import parse_recipe
from cveff.runtime.engines import open_file

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
QUICK = {"epochs": 1, "optimizer": "adamw", "learning_rate": 1e-3, "keep": "last"}


@pytest.mark.parametrize(
    "training",
    [{"kind": "train", **QUICK}, {"kind": "distill", "train": QUICK}],
    ids=["train", "distill"],
)
def test_training_behind_it_is_quantization_aware(training: dict[str, Any], tmp_path: Path) -> None:
    quantize = {"kind": "quantize", "images": 64, "weights": "nearest", "method": "minmax"}
    recipe = parse_recipe(
        {"data": {"source": "digits"}, "model": {"checkpoint": "digits"}, "steps": [quantize, training]}
    )
    assert parse_recipe(recipe.to_json()) == recipe
    result = pipeline.run(recipe, out=tmp_path / "run")
    before, after = (
        cveff.load(tmp_path / "run" / "phases" / name) for name in ("0-quantize", f"1-{training['kind']}")
    )
    assert [edit.kind for edit in after.spec.edits] == ["quantize"] and is_quantized(after.module)
    steps = [
        torch.cat([part.scale.flatten() for part in model.module.modules() if isinstance(part, FakeQuantize)])
        for model in (before, after)
    ]
    assert not torch.equal(*steps), "steps were learned"
    assert [effect.kind for effect in result.effects] == ["start", "quantize", training["kind"]]
    # What training validates is the rounded network itself: it is not trained in bfloat16, which would round it again.
    lines = (tmp_path / "run" / "train" / f"1-{training['kind']}" / "metrics.jsonl").read_text().splitlines()
    validated = [json.loads(line)["val/accuracy"] for line in lines if "val/accuracy" in line]
    assert validated[-1] == result.effects[-1].accuracy
    path = cveff.export(after, tmp_path / "model.onnx")
    data = load("digits")
    with open_file("onnxruntime", path, threads=1) as session:
        images, targets = next(iter(data.evaluation.evaluation_batches(after.spec.input, 1000)))
        assert (session(images).argmax(1) == targets).mean() == pytest.approx(result.accuracy, abs=0.006)


def test_the_example_of_the_page_is_a_recipe() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    recipes = [parse_recipe(tomllib.loads(block)) for block in blocks]
    kinds = [[step.kind for step in recipe.steps] for recipe in recipes]
    assert ["quantize", "distill"] in kinds
