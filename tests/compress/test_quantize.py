"""`Quantize` on a trained network: accuracy, files that answer as simulated, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cveff
from cveff.compress.quant.network import is_quantized, roundings
from cveff.compress.quantize import Quantize
from cveff.data import Data, load
from cveff.errors import StepError
from cveff.export.normalize import deployable
from cveff.model import Model
from cveff.pipeline import evaluate
from cveff.runtime.engines import open_file
from cveff.steps import Run
from cveff.target import Target

ZOO = Path(__file__).parents[2] / "model_zoo" / "weights"


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


@pytest.fixture(scope="module")
def trained() -> Model:
    return cveff.load(ZOO / "digits")


@pytest.fixture(scope="module")
def quantized(trained: Model, digits: Data) -> Model:
    return cveff.apply(trained, Quantize(images=128), data=digits)


def test_accuracy_stays(trained: Model, quantized: Model, digits: Data) -> None:
    assert is_quantized(quantized.module) and not is_quantized(trained.module)
    assert abs(evaluate(quantized, digits) - evaluate(trained, digits)) <= 0.006


def test_saved_and_loaded_gives_bit_equal_outputs(quantized: Model, tmp_path: Path) -> None:
    cveff.save(quantized, tmp_path / "m")
    again = cveff.load(tmp_path / "m")
    spec = quantized.spec.input
    x = torch.randn(4, spec.channels, *spec.size)
    with torch.no_grad():
        assert torch.equal(again.module.eval()(x), quantized.module.eval()(x))
    assert again.spec == quantized.spec


def test_the_file_answers_as_simulated(quantized: Model, tmp_path: Path) -> None:
    path = cveff.export(quantized, tmp_path / "int8.onnx")
    spec = quantized.spec.input
    images = np.random.default_rng(0).integers(0, 256, (64, *spec.size, spec.channels), np.uint8)
    with torch.no_grad():
        expected = deployable(quantized.module, spec)(torch.from_numpy(images)).numpy()
    edit = quantized.spec.edits[-1]
    last = list(roundings(quantized.module, edit.placement).tensors.values())[-1]
    for optimized in (False, True):
        with open_file("onnxruntime", path, threads=1, options={"graph_optimizations": optimized}) as session:
            found = session(images)
        assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.98
        # A value half-way between two steps falls to either side: that moves the last layer by a few steps.
        step = float(last.scale) * float(quantized.module.get_parameter("fc.weight").detach().abs().max())
        assert np.abs(found - expected).max() <= 4 * step, optimized
    assert (
        path.stat().st_size
        < 0.45 * cveff.export(cveff.load(ZOO / "digits"), tmp_path / "f.onnx").stat().st_size
    )


def test_the_model_that_came_in_is_left_as_it_was(trained: Model, quantized: Model) -> None:
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            trained.module.state_dict().values(),
            cveff.load(ZOO / "digits").module.state_dict().values(),
            strict=True,
        )
    )


def test_a_quantized_model_is_refused(quantized: Model, digits: Data) -> None:
    with pytest.raises(StepError, match="is quantized already"):
        cveff.apply(quantized, Quantize(), data=digits)


def test_the_target_decides_whether_channels_are_narrowed(
    trained: Model, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(saturation: Any, own: list[str], target: tuple[str, ...] | None) -> dict[str, torch.Tensor]:
        monkeypatch.setattr("cveff.compress.quantize.isa", lambda: own)
        monkeypatch.setattr("cveff.target.isa", lambda: own)
        step = Quantize(images=64, method="minmax", weights="nearest", equalize=False, saturation=saturation)
        device = None if target is None else Target("t", "", (("onnxruntime", "int8"),), instructions=target)
        return step(cveff.load(ZOO / "digits"), Run(data=digits, target=device)).module.state_dict()

    def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(value, second[name]) for name, value in first.items())

    clips, exact = ["avx2", "fma"], ["avx2", "fma", "avx_vnni"]
    narrowed, ignored = weights("narrow", exact, None), weights("ignore", clips, None)
    assert not equal(narrowed, ignored)
    assert equal(weights("auto", exact, tuple(clips)), narrowed), (
        "built where nothing clips, for where it does"
    )
    assert equal(weights("auto", clips, tuple(exact)), ignored)
    assert equal(weights("auto", clips, ("asimd",)), ignored)
    assert equal(weights("auto", clips, None), narrowed)
    assert equal(weights("auto", exact, None), ignored)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int7"}, "quantize.precision is 'int7'; give one of int8"),
        ({"scheme": "npu"}, "quantize.scheme is 'npu'"),
        ({"method": "guess"}, "quantize.method is 'guess'; give one of minmax"),
        ({"weights": "random"}, "quantize.weights is 'random'"),
        ({"weight_method": "max"}, "quantize.weight_method is 'max'"),
        ({"equalize": "maybe"}, "quantize.equalize is 'maybe'"),
        ({"saturation": "clip"}, "quantize.saturation is 'clip'"),
        ({"images": 0}, "quantize.images is 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StepError, match=message):
        Quantize(**settings)
