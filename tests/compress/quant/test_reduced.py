"""What `Quantize` does for fewer bits of float: the right network, and a line for what stays in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cveff
from cveff.compress.quant.network import is_cast, is_quantized
from cveff.compress.quantize import Quantize
from cveff.errors import StepError
from cveff.export.deploy import deploy
from cveff.model import Model
from cveff.progress import Silent
from cveff.steps import Run

ZOO = Path(__file__).parents[3] / "model_zoo" / "weights"


class Messages(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def model() -> Model:
    return cveff.load(ZOO / "digits")


def accuracy(model: Model) -> float:
    data = cveff.data.load("digits")
    from cveff.compress.samples import samples

    hits = [
        model.module(images).argmax(1) == targets
        for images, targets in samples(data.val, model.spec.input, 200)
    ]
    return float(torch.cat(hits).float().mean())


@pytest.mark.parametrize(("precision", "lost"), [("fp16", 0.005), ("bf16", 0.02), ("fp8", 0.03)])
@torch.no_grad()
def test_each_precision_keeps_the_accuracy_and_says_what_it_did(
    model: Model, precision: str, lost: float
) -> None:
    messages = Messages()
    step = Quantize(precision=precision, images=32)
    found = step(model, Run(data=cveff.data.load("digits"), progress=messages))
    assert is_cast(found.module) == (precision != "fp8")
    assert is_quantized(found.module) == (precision == "fp8")
    assert messages.lines[0].startswith(f"{precision}: ")
    assert accuracy(found) >= accuracy(model) - lost
    assert len(found.spec.edits) == len(model.spec.edits) + 1
    for again in ("int8", "bf16", "fp8"):
        with pytest.raises(StepError, match="quantized already"):
            Quantize(precision=again)(found, Run(data=cveff.data.load("digits")))


def test_what_stays_in_float32_is_named_with_its_range(model: Model) -> None:
    messages = Messages()
    with torch.no_grad():
        next(part for part in model.module.modules() if isinstance(part, torch.nn.Linear)).weight[0, 0] = 7e4
    Quantize(precision="fp16", images=16)(model, Run(data=cveff.data.load("digits"), progress=messages))
    assert any("stays in float32: its parameter" in line and "7e+04" in line for line in messages.lines)


def test_deploy_starts_from_float32(model: Model, tmp_path: Path) -> None:
    data = cveff.data.load("digits")
    half = Quantize(precision="fp16", images=8)(model, Run(data=data))
    with pytest.raises(StepError, match="is in 16 bits; deploy starts from the float32 model"):
        deploy(half, data=data, out=tmp_path / "bundle")


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(StepError, match="'fp4'"):
        Quantize(precision="fp4")
