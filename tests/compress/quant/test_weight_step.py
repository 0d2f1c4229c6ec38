"""The step with weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cveff
from cveff.compress.quant.weight_choice import is_packed, packed_layers
from cveff.compress.quant.weight_only import WeightOnly
from cveff.compress.quant.weight_step import round_model_weights
from cveff.compress.quantize import Quantize
from cveff.errors import StepError
from cveff.model import Model
from cveff.progress import Silent
from cveff.steps import Run


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def vit() -> Model:
    torch.manual_seed(0)
    arguments = {
        "image_size": 8,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 1,
        "num_heads": 2,
        "channels": 1,
    }
    return cveff.create("vit_tiny_patch16_224", num_classes=10, **arguments)


@pytest.mark.parametrize(("precision", "bits"), [("int4-weights", 4), ("int8-weights", 8)])
def test_the_step_rounds_saves_and_loads(tmp_path: Path, precision: str, bits: int) -> None:
    model, lines = vit(), Lines()
    step = Quantize(
        precision=precision, group_size=32, symmetric=True, images=32, exclude=("blocks.0.mlp.fc2",)
    )
    changed = cveff.apply(model, step, data="digits", progress=lines)
    layers = dict(packed_layers(changed.module))
    assert set(layers) == {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1"}
    assert all(layer.grid.bits == bits and layer.grid.symmetric for layer in layers.values())
    assert not is_packed(model.module)
    assert any(
        line.startswith("3 layers rounded: ") and "blocks.0.mlp.fc2 is excluded" in line
        for line in lines.lines
    )
    cveff.save(changed, tmp_path / "m")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(cveff.load(tmp_path / "m").module(x), changed.module.eval()(x))
    for again in (step, Quantize()):
        with pytest.raises(StepError, match="quantized already"):
            cveff.apply(changed, again, data="digits")


def test_nearest_looks_at_no_images() -> None:
    changed = round_model_weights(vit(), Run(), WeightOnly(weights="nearest"), 8)
    assert is_packed(changed.module)
    with pytest.raises(StepError, match="pass data=…, or choose weights='nearest'"):
        round_model_weights(vit(), Run(), WeightOnly(), 8)


def test_settings_are_checked_at_construction() -> None:
    with pytest.raises(StepError, match="group size is 48"):
        Quantize(precision="int4-weights", group_size=48)
