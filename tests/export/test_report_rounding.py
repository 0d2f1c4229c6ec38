"""The report's section on integers, from what deploy writes about real files and from made-up extremes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cveff
from cveff.compress.quant.describe import describe
from cveff.compress.quant.post_training import PostTraining
from cveff.compress.quant.segments import segments
from cveff.compress.samples import samples
from cveff.data import load
from cveff.export.report_rounding import MOST, Extent, range_bars, rounding_section

ZOO = Path(__file__).parents[2] / "model_zoo" / "weights"


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    """The digits network with its first segment in floats."""
    model, data = cveff.load(ZOO / "digits"), load("digits")
    assert data.train is not None
    batches = [images for images, _ in samples(data.train, model.spec.input, 64)]
    whole = PostTraining(weights="nearest", method="minmax").quantize(model.module, model.spec.input, batches)
    first = segments(whole.exact, list(whole.roundings.weights))[0]
    work = PostTraining(weights="nearest", method="minmax", exclude=first.operators)
    return describe(work.quantize(model.module, model.spec.input, batches), batches[:1])


def _manifest(rounding: object) -> dict[str, Any]:
    return {"candidates": [{"engine": "onnxruntime", "precision": "int8", "rounding": rounding}]}


def test_every_layer_and_tensor_has_its_figures(described: dict[str, Any]) -> None:
    assert [layer["precision"] for layer in described["layers"]].count("fp32") == 1
    in_floats = next(layer for layer in described["layers"] if layer["precision"] == "fp32")
    assert in_floats["why"] == "was to stay in floats"
    for layer in described["layers"]:
        if layer["precision"] == "int8":
            assert layer["decibels"] > 25 and layer["nats"] > 0 and layer["why"] == ""
    for tensor in described["tensors"]:
        low, high = tensor["seen"]
        # minmax keeps all that was seen, and zero; both within a step.
        step = (tensor["high"] - tensor["low"]) / 255
        assert tensor["low"] <= min(low, 0) + step and tensor["high"] >= high - step
        assert tensor["decibels"] > 25


def test_the_section_shows_layers_ranges_and_reasons(described: dict[str, Any]) -> None:
    page = rounding_section(_manifest(described))
    assert "What was rounded" in page
    assert "was to stay in floats" in page
    assert page.count("<svg") == 2
    assert page.count('class="seen"') == len(described["tensors"])
    assert f"{len(described['layers']) - 1} of {len(described['layers'])} layers in 8 bits" in page


def test_without_integers_there_is_no_section() -> None:
    assert rounding_section(_manifest(None)) == ""
    assert rounding_section({"candidates": [{"engine": "openvino", "precision": "fp32"}]}) == ""


def test_names_are_no_markup_and_long_lists_are_cut(described: dict[str, Any]) -> None:
    tensors = [
        {**described["tensors"][0], "name": f"<b>{index}</b>", "nats": float(index)}
        for index in range(MOST + 40)
    ]
    page = rounding_section(_manifest({**described, "tensors": tensors}))
    assert "<b>" not in page
    assert page.count('class="seen"') == MOST
    # The costliest are kept, in the order of the network.
    assert "&lt;b&gt;39&lt;/b&gt;" not in page.partition("Ranges that are kept")[2]
    assert "&lt;b&gt;40&lt;/b&gt;" in page.partition("Ranges that are kept")[2]


def test_ranges_of_nothing_but_zero_can_be_drawn() -> None:
    picture = range_bars(
        [Extent("dead", (0.0, 0.0), (0.0, 0.0)), Extent("narrow", (-1e-9, 1e-9), (-1e9, 1e9))]
    )
    numbers = [float(part.split('"')[0]) for part in picture.split('x1="')[1:]]
    assert all(math.isfinite(number) for number in numbers)
    assert np.isfinite([float(part.split('"')[0]) for part in picture.split('width="')[1:]]).all()
