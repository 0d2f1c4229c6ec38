"""`LowRank`: least loss for the milliseconds; what gains nothing is left alone; the file's clock has the last word."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cveff
from cveff.compress import LowRank, low_rank
from cveff.compress.low_rank_calibration import collect
from cveff.compress.low_rank_options import (
    Stage,
    macs,
)
from cveff.data.dataset import Data
from cveff.errors import StepError
from cveff.model import Model
from cveff.steps import Run

PER_MILLISECOND = 1e6
ARCHITECTURES = [
    ("vit_tiny_patch16_224", {"depth": 2}),
    ("test_resnet", {}),
    ("convnext_atto", {"depths": [1, 1, 1, 1]}),
    ("mobilenetv4_conv_small_035", {}),
]


def macs_cost(stages: Sequence[Stage]) -> list[float]:
    """A device on which every multiply–add takes the same time."""
    return [macs([stage]) / PER_MILLISECOND for stage in stages]


class MacsTimer:
    """A `ModelTimer` of the same device; `extra` milliseconds for each chain of factors."""

    def __init__(self, extra: float = 0.0, speed: float = 1.0) -> None:
        self.extra, self.speed, self.asked = extra, speed, []

    def milliseconds(self, models: Mapping[str, Model]) -> dict[str, float]:
        self.asked.append(list(models))
        return {name: self._one(model) for name, model in models.items()}

    def _one(self, model: Model) -> float:
        spec = model.spec.input
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.module.eval()(torch.zeros(1, spec.channels, *spec.size))
        chains = sum(len(edit.layers) for edit in model.spec.edits)
        return counter.get_total_flops() / 2 / PER_MILLISECOND / self.speed + self.extra * chains


class Notes:
    """A `Progress` that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def track(self, items, description, total=None):
        yield from items

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "measured_cost", lambda engine, threads: macs_cost)


@pytest.fixture(scope="module")
def digits() -> Data:
    return cveff.data.load("digits")


def create(architecture: str, **arguments) -> Model:
    torch.manual_seed(0)
    model = cveff.create(architecture, num_classes=10, image_size=32, channels=1, **arguments)
    spec = dataclasses.replace(model.spec.input, enlarge=True)
    return Model(dataclasses.replace(model.spec, input=spec), model.module.eval())


def resnet() -> Model:
    """3×3 convolutions, narrow enough for a test."""
    return create("test_resnet")


def images_of(model: Model, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, model.spec.input.channels, *model.spec.input.size, generator=generator)


@pytest.mark.parametrize(("architecture", "arguments"), ARCHITECTURES)
def test_the_goal_is_met_and_the_result_loads_bit_equal(
    architecture: str, arguments: dict, digits: Data, tmp_path: Path
) -> None:
    model, timer = create(architecture, **arguments), MacsTimer()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    notes = Notes()
    found = low_rank.LowRank(latency=0.8, images=16)(model, Run(data=digits, timer=timer, progress=notes))
    assert timer.milliseconds({"a": found})["a"] <= 0.8 * 1.02 * timer.milliseconds({"a": model})["a"]
    assert all(torch.equal(value, model.module.state_dict()[name]) for name, value in before.items())
    cveff.save(found, tmp_path / "model")
    again = cveff.load(tmp_path / "model")
    with torch.inference_mode():
        images = images_of(model)
        assert torch.equal(found.module.eval()(images), again.module(images))
        assert found.module(images).isfinite().all()
    assert "low rank: " in notes.lines[0] and "ms, not" in notes.lines[0]
    assert any("left alone" in line for line in notes.lines)


def test_an_error_limit_holds_for_every_layer_and_fast_layers_are_taken(digits: Data) -> None:
    model = resnet()
    notes = Notes()
    found = LowRank(energy=0.3, images=16)(model, Run(data=digits, timer=MacsTimer(), progress=notes))
    (edit,) = found.spec.edits
    assert edit.layers
    errors = [float(line.split("error ")[1].rstrip("%")) for line in notes.lines if "output error" in line]
    assert len(errors) == len(edit.layers) and max(errors) <= 30
    # The very same choice without the file's clock, by the table alone.
    alone = LowRank(energy=0.3, images=16)(model, Run(data=digits))
    assert alone.spec == found.spec


def test_chains_that_the_file_is_slower_with_are_undone(digits: Data) -> None:
    """On the device a chain costs a fixed time that the table does not know; small layers do not earn it."""
    model, timer, notes = resnet(), MacsTimer(extra=0.8), Notes()
    found = LowRank(energy=0.5, images=16)(model, Run(data=digits, timer=timer, progress=notes))
    eager = LowRank(energy=0.5, images=16)(model, Run(data=digits))
    kept = found.spec.edits[0].layers
    assert 0 < len(kept) < len(eager.spec.edits[0].layers)
    assert any("was undone" in line for line in notes.lines)
    times = timer.milliseconds({"dense": model, "all": eager, "found": found})
    assert times["found"] < min(times["all"], times["dense"])


def test_where_nothing_is_faster_nothing_is_changed(digits: Data) -> None:
    model, notes = resnet(), Notes()
    run = Run(data=digits, timer=MacsTimer(extra=1e3), progress=notes)
    found = LowRank(energy=0.5, images=16)(model, run)
    assert found.spec == model.spec and found.module is model.module
    assert notes.lines[0] == "low rank: no layer got faster; the model stays as it is"
    with pytest.raises(StepError, match=r"low_rank.latency 0.8 cannot be reached: the best measured is 1.00"):
        LowRank(latency=0.8, images=48)(model, run)


def test_the_goal_is_met_where_the_table_is_wrong_by_a_factor(digits: Data) -> None:
    model = create("vit_tiny_patch16_224", depth=2)
    for speed in (0.5, 2.0):  # the file is slower or faster than its blocks
        timer = MacsTimer(speed=speed)
        found = LowRank(latency=0.75, images=16)(model, Run(data=digits, timer=timer))
        times = timer.milliseconds({"dense": model, "found": found})
        assert 0.65 <= times["found"] / times["dense"] <= 0.75 * 1.02


def test_nothing_is_fitted_to_odd_images(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = torch.zeros(64, dtype=torch.bool)
    mark[[3, 50]] = True
    monkeypatch.setattr(low_rank, "odd_images", lambda module, batches: mark)
    counts = []

    def counted(module, paths, batches, count, seed):
        counts.append((count, sum(len(images) for images in batches())))
        return collect(module, paths, batches, count, seed)

    monkeypatch.setattr(low_rank, "collect", counted)
    notes = Notes()
    cveff.apply(resnet(), LowRank(energy=0.3, images=64), data=digits, progress=notes)
    assert counts == [(62, 62)]
    assert notes.lines[0].startswith("low rank: 2 of 64 images reach far larger values than the others")


def test_whitening_answers_closer_to_the_dense_network(digits: Data) -> None:
    model = create("vit_tiny_patch16_224", depth=2)
    run = Run(data=digits, timer=MacsTimer())
    images = next(low_rank.LowRank(latency=0.5)._batches(model, run)[0]())
    distances = []
    for whiten in (True, False):
        found = LowRank(latency=0.6, whiten=whiten, images=256)(model, run)
        with torch.inference_mode():
            expected = model.module(images)
            distances.append(float((found.module.eval()(images) - expected).square().mean()))
    assert distances[0] < 0.5 * distances[1]


def test_the_exported_file_agrees(digits: Data, tmp_path: Path) -> None:
    model = resnet()
    found = LowRank(energy=0.3, images=16)(model, Run(data=digits))
    assert found.spec.edits
    assert cveff.export(found, tmp_path / "model.onnx", check=True).is_file()


def test_recovery_trains_the_factors(digits: Data) -> None:
    from cveff.compress import Distill
    from cveff.train import Train

    recover = Distill(alpha=0.5, train=Train(epochs=1, batch_size=256, keep="last", precision="fp32"))
    model = resnet()
    found = LowRank(energy=0.5, images=16, recover=recover)(model, Run(data=digits, teacher=resnet()))
    plain = LowRank(energy=0.5, images=16)(model, Run(data=digits))
    assert found.spec == plain.spec
    path = next(iter(found.spec.edits[0].layers))
    weights = [item.module.get_submodule(path)[0].weight for item in (found, plain)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "has no goal; give latency"),
        ({"latency": 1.0}, "latency is 1.0; give a share between 0 and 1"),
        ({"latency": 0.0}, "latency is 0.0"),
        ({"energy": -0.1}, "energy is -0.1"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"energy": 0.1, "images": 0}, "images is 0"),
        ({"energy": 0.1, "min_gain": 1.0}, "min_gain is 1.0"),
        ({"energy": 0.1, "methods": ("qr",)}, r"methods is \('qr',\); give some of svd"),
        ({"energy": 0.1, "methods": ()}, r"methods is \(\)"),
        ({"energy": 0.1, "engine": "tflite"}, "engine is 'tflite'; known: onnxruntime"),
    ],
)
def test_bad_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(StepError, match=words):
        LowRank(**settings)


def test_bad_inputs_are_refused(digits: Data) -> None:
    model = resnet()
    with pytest.raises(StepError, match="LowRank needs data; pass data="):
        cveff.apply(model, LowRank(energy=0.1))
    with pytest.raises(StepError, match="LowRank needs target"):
        cveff.apply(model, LowRank(latency=0.5, whiten=False))
    assert cveff.apply(model, LowRank(energy=0.9, whiten=False)).spec.edits  # needs neither
    run = Run(data=digits, timer=MacsTimer())
    with pytest.raises(StepError, match="pass target="):
        LowRank(latency=0.5)(model, Run(data=digits))
    with pytest.raises(StepError, match="set whiten to false"):
        LowRank(energy=0.5)(model, Run())
    with pytest.raises(StepError, match=r"latency 0.01 cannot be reached: the best measured is 0\.\d\d"):
        LowRank(latency=0.01, images=16)(model, run)
    with pytest.raises(StepError, match=r"cannot be reached.* raise energy"):
        LowRank(latency=0.3, energy=0.001, images=16)(model, run)
    with pytest.raises(StepError, match="exclude names 'layer9'"):
        LowRank(energy=0.5, exclude=("layer9",))(model, run)
    with pytest.raises(StepError, match="put a reparameterize step before"):
        LowRank(energy=0.5)(cveff.create("repvgg_a0", num_classes=10, image_size=32), run)
    empty = dataclasses.replace(digits, train=digits.train.subset(np.arange(0)))
    with pytest.raises(StepError, match="split 'train' of digits is empty"):
        LowRank(energy=0.5)(model, Run(data=empty))
    model.module = nn.Sequential(nn.Conv2d(1, 8, 3, groups=1, padding_mode="reflect"), nn.Flatten())
    with pytest.raises(StepError, match="no layer that can be factorised; 0 pads with 'reflect'"):
        LowRank(energy=0.5)(model, run)


def test_what_is_not_finite_is_named(digits: Data) -> None:
    model = resnet()
    with torch.no_grad():
        model.module.get_submodule("layer1.0.conv1").weight.fill_(float("nan"))
    with pytest.raises(StepError, match="answers to the calibration images are not finite"):
        LowRank(energy=0.5, images=16)(model, Run(data=digits))
    images = torch.full((2, 1, 4, 4), float("inf"))
    with pytest.raises(StepError, match="what reaches layer '1' is not finite"):
        list(collect(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), ["1"], lambda: iter([images]), 2, 0))


def test_excluded_layers_stay(digits: Data) -> None:
    found = LowRank(energy=0.5, images=16, exclude=("layer1", "layer4.0.conv1"))(resnet(), Run(data=digits))
    paths = list(found.spec.edits[0].layers)
    assert paths and not [path for path in paths if path.startswith("layer1") or path == "layer4.0.conv1"]


def test_recipes_take_the_step(tmp_path: Path) -> None:
    from cveff.recipe import parse_recipe

    values = {
        "data": {"source": "digits"},
        "train": {},
        "steps": [{"kind": "low_rank", "latency": 0.7, "recover": {"alpha": 0.5, "train": {"epochs": 2}}}],
        "deploy": {"target": "edge-cpu"},
    }
    recipe = parse_recipe(values)
    (step,) = recipe.steps
    assert step.latency == 0.7 and step.recover.train.epochs == 2
    assert parse_recipe(recipe.to_json()) == recipe
    assert SimpleNamespace(**recipe.to_json()["steps"][0]).kind == "low_rank"
