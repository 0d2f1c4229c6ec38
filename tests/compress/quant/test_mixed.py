"""Mixed precision on a trained network: times from a timer that knows them, losses on real digits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import cveff
from cveff.compress.quant.layers import find_layers
from cveff.compress.quant.mixed import FP32, INT8, MIXED, MixedPrecision
from cveff.compress.quant.network import QuantizedGraph
from cveff.compress.quant.partial import without
from cveff.compress.quant.points import Points
from cveff.compress.quant.post_training import PostTraining, Quantized
from cveff.compress.quant.segments import segments
from cveff.compress.quantize import Quantize
from cveff.compress.samples import samples
from cveff.data import Data, load
from cveff.errors import StepError
from cveff.model import Model

ZOO = Path(__file__).parents[3] / "model_zoo" / "weights"
WORK = PostTraining(weights="nearest", method="minmax", equalize=False)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


@pytest.fixture(scope="module")
def model() -> Model:
    return cveff.load(ZOO / "digits")


@pytest.fixture(scope="module")
def batches(model: Model, digits: Data) -> list[torch.Tensor]:
    assert digits.train is not None
    return [images for images, _ in samples(digits.train, model.spec.input, 128)]


@pytest.fixture
def found(model: Model, batches: list[torch.Tensor]) -> Quantized:
    return WORK.quantize(model.module, model.spec.input, batches)


class Times:
    """Floats take 20 ms; every layer in integers takes off 1 ms, and those of `slower` put 1 on."""

    engine, threads = "onnxruntime", 1

    def __init__(self, slower: Callable[[str], bool] = lambda _: False) -> None:
        self.slower = slower
        self.calls: list[list[str]] = []

    def milliseconds(self, models: Mapping[str, Model]) -> dict[str, float]:
        self.calls.append(list(models))
        return {name: self._time(model) for name, model in models.items()}

    def _time(self, model: Model) -> float:
        edits = [edit for edit in model.spec.edits if isinstance(edit, QuantizedGraph)]
        layers = [site.reader for edit in edits for site in edit.placement.weights]
        return 20.0 + sum(1.0 if self.slower(name) else -1.0 for name in layers)


def _points(model: Model, data: Data) -> Points:
    return Points.of(model.module, data.val, model.spec.input)


def test_without_nothing_it_is_the_same_network(found: Quantized, batches: list[torch.Tensor]) -> None:
    same = without(found, ())
    with torch.no_grad():
        assert torch.equal(same.graph(batches[0]), found.graph(batches[0]))


def test_operators_in_floats_have_their_own_weights_and_the_others_keep_theirs(
    found: Quantized, batches: list[torch.Tensor]
) -> None:
    part = segments(found.exact, list(found.roundings.weights))[1]
    fewer = without(found, part.operators)
    assert set(found.roundings.weights) - set(fewer.roundings.weights) == set(part.layers)
    for name, rounding in fewer.roundings.weights.items():
        assert torch.equal(rounding.scale, found.roundings.weights[name].scale)
    own, exact = ({layer.name: layer for layer in find_layers(graph)} for graph in (fewer.graph, found.exact))
    for name in part.layers:
        assert torch.equal(own[name].matrix(fewer.graph), exact[name].matrix(found.exact))
    with torch.no_grad():
        assert not torch.equal(fewer.graph(batches[0]), found.graph(batches[0]))


def test_with_every_layer_in_floats_nothing_is_left(found: Quantized) -> None:
    with pytest.raises(StepError, match="no layer with weights is left"):
        without(found, found.roundings.weights)


def test_eight_bits_throughout_where_all_is_faster_and_nothing_lost(
    model: Model, digits: Data, found: Quantized, batches: list[torch.Tensor]
) -> None:
    timer = Times()
    mixed = MixedPrecision(WORK, timer, _points(model, digits), 1.0).search(model, found, batches)
    assert mixed.chosen == INT8
    assert mixed.quantized is found
    assert len(timer.calls) == 1  # every segment in turns with the whole
    assert [part.milliseconds for part in mixed.parts] == [len(part.layers) for part in mixed.parts]
    assert min(part.nats for part in mixed.parts) > 0, mixed.parts


def test_where_eight_bits_are_fast_enough_nothing_is_searched(
    model: Model, digits: Data, found: Quantized, batches: list[torch.Tensor]
) -> None:
    timer, points = Times(), _points(model, digits)
    mixed = MixedPrecision(WORK, timer, points, 1.0, enough=0.6).search(model, found, batches)
    assert (mixed.chosen, mixed.parts, timer.calls) == (INT8, (), [[FP32, INT8]])
    searched = MixedPrecision(WORK, timer, points, 1.0, enough=0.4).search(model, found, batches)
    assert searched.chosen == INT8 and searched.parts


def test_what_is_faster_in_floats_stays_there(
    model: Model, digits: Data, found: Quantized, batches: list[torch.Tensor]
) -> None:
    first = segments(found.exact, list(found.roundings.weights))[0]
    timer = Times(slower=lambda name: name in first.layers)
    mixed = MixedPrecision(WORK, timer, _points(model, digits), 1.0).search(model, found, batches)
    assert mixed.chosen == MIXED
    assert [part.name for part in mixed.parts if part.why] == [first.name]
    assert "faster in floats" in "\n".join(mixed.lines())
    assert mixed.quantized is not None
    assert not set(first.layers) & set(mixed.quantized.roundings.weights)
    assert mixed.milliseconds[MIXED] < min(mixed.milliseconds[INT8], mixed.milliseconds[FP32])


def test_what_loses_too_much_goes_back_to_floats(
    model: Model, digits: Data, found: Quantized, batches: list[torch.Tensor]
) -> None:
    layer = list(found.roundings.weights)[3]
    found.roundings.weights[layer].scale.mul_(1000)  # everything rounds to zero
    points = _points(model, digits)
    assert points.lost(found.graph) > 5
    # Calibrating anew would mend what this test spoilt.
    mixed = MixedPrecision(WORK, Times(), points, 1.0).search(model, found, batches)
    assert mixed.chosen == MIXED
    assert layer in {name for part in mixed.parts if part.why for name in part.layers}
    assert mixed.lost[INT8] > 5
    assert mixed.lost[MIXED] <= 1


def test_floats_where_integers_are_slower(
    model: Model, digits: Data, found: Quantized, batches: list[torch.Tensor]
) -> None:
    timer = Times(slower=lambda _: True)
    mixed = MixedPrecision(WORK, timer, _points(model, digits), 1.0).search(model, found, batches)
    assert mixed.chosen == FP32
    assert mixed.quantized is None


def test_points_without_labels_are_answers_that_differ(model: Model, digits: Data) -> None:
    labelled = _points(model, digits)
    points = Points(labelled.batches, labelled.expected, None)
    assert points.lost(model.module) == 0

    class Shifted(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return model.module(images).roll(1, dims=1)

    assert points.lost(Shifted()) == 100


def test_the_step_measures_and_records(model: Model, digits: Data, tmp_path: Path) -> None:
    step = Quantize(precision="auto", images=64, weights="nearest", method="minmax")
    first = "stem."
    made = cveff.apply(
        model, step, data=digits, target="edge-cpu", timer=Times(lambda name: first in name), folder=tmp_path
    )
    (edit,) = [edit for edit in made.spec.edits if isinstance(edit, QuantizedGraph)]
    assert not any(first in site.reader for site in edit.placement.weights)
    assert '"chosen": "mixed"' in (tmp_path / "mixed_precision.json").read_text()
    cveff.save(made, tmp_path / "saved")
    images = torch.randn(4, model.spec.input.channels, *model.spec.input.size)
    with torch.no_grad():
        again = cveff.load(tmp_path / "saved").module(images)
        assert torch.equal(again, made.module(images))


def test_the_step_needs_a_target(model: Model, digits: Data) -> None:
    with pytest.raises(StepError, match="target"):
        cveff.apply(model, Quantize(precision="auto"), data=digits)
    with pytest.raises(StepError, match="max_accuracy_drop"):
        Quantize(precision="auto", max_accuracy_drop=-1)
