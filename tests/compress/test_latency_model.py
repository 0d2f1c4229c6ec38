"""`LatencyModel`: fitted on whole models, anchored to one, kept beside its table; predicts what was never built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cveff
from cveff.compress.analysis import analyze
from cveff.compress.blocks import blocks
from cveff.compress.latency_model import LatencyModel
from cveff.compress.trace import Trace, trace
from cveff.errors import CveffError
from cveff.measure.block import Block
from cveff.measure.block_latency import BlockLatency


def volume(engine: str, block: Block, threads: int) -> float:
    """A measure for tests: grows with every width and with the image."""
    return float(np.prod(block.widths() or (1,))) * 1e-4 + float(np.prod(block.inputs[0])) * 1e-6


@pytest.fixture
def table(tmp_path: Path) -> BlockLatency:
    return BlockLatency("onnxruntime", 1, tmp_path, measure=volume)


@pytest.fixture(scope="module")
def traced() -> Trace:
    model = cveff.create("small_resnet_s", num_classes=3, image_size=16)
    return trace(model.module, model.spec.input)


def networks(count: int = 12) -> list[list[Block]]:
    """Networks of different depth and width."""
    random = np.random.default_rng(0)
    found = []
    for index in range(count):
        width, side = 8 * int(random.integers(1, 20)), int(random.integers(4, 30))
        block = Block("conv", ((1, width, side, side),), (width, width, 3, 3), (1, 1), (1, 1))
        found.append([block] * (2 + index % 5 * 7))
    return found


def test_the_fit_finds_the_law_whatever_one_disturbed_model_says(table: BlockLatency) -> None:
    law = LatencyModel(table, 1.25, 0.004)
    times = [law.predict_blocks(network, interpolate=False) for network in networks()]
    found = LatencyModel.fit(table, networks(), times)
    assert (found.scale, found.per_block) == pytest.approx((1.25, 0.004), rel=1e-6)
    assert found.num_models == 12
    times[5] *= 3
    disturbed = LatencyModel.fit(table, networks(), times)
    assert (disturbed.scale, disturbed.per_block) == pytest.approx((1.25, 0.004), rel=0.02)


def test_no_weight_is_negative(table: BlockLatency) -> None:
    times = [table.milliseconds(network).sum() - 1e-4 * len(network) for network in networks()]
    found = LatencyModel.fit(table, networks(), times)
    assert found.per_block == 0
    assert found.scale > 0


def test_a_fit_is_found_again_by_the_same_device(table: BlockLatency, tmp_path: Path, traced: Trace) -> None:
    plain = LatencyModel.load(table)
    assert (plain.scale, plain.per_block, plain.num_models) == (1, 0, 0)
    assert plain.predict(traced) == pytest.approx(table.milliseconds(blocks(traced)).sum())
    model = LatencyModel(table, 1.5, 0.01, 20)
    path = model.save()
    assert path.parent == table.path.parent
    again = LatencyModel.load(BlockLatency("onnxruntime", 1, tmp_path, measure=volume))
    assert again.predict(traced) == model.predict(traced)
    assert LatencyModel.load(BlockLatency("onnxruntime", 2, tmp_path, measure=volume)).num_models == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', '{"schema": 1, "scale": 1}'])
def test_a_damaged_fit_is_an_error_that_names_the_file(table: BlockLatency, text: str) -> None:
    path = LatencyModel(table).save()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CveffError, match=r"model\.json is damaged .* remove it"):
        LatencyModel.load(table)


def test_an_anchored_model_is_right_about_its_anchor(table: BlockLatency, traced: Trace) -> None:
    model = LatencyModel(table, 1.2, 0.01)
    anchored = model.anchored(traced, 3.0)
    assert anchored.predict(traced) == pytest.approx(3.0)
    assert anchored.scale / model.scale == pytest.approx(anchored.per_block / model.per_block)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(CveffError, match="positive time"):
            model.anchored(traced, bad)


def test_a_matched_model_puts_between_blocks_what_the_kernels_do_not_explain(
    table: BlockLatency, traced: Trace
) -> None:
    kernels = table.milliseconds(blocks(traced)).sum()
    matched = LatencyModel(table).matched(traced, kernels + 2.0)
    assert matched.predict(traced) == pytest.approx(kernels + 2.0)
    assert (matched.scale, matched.per_block) == (1, pytest.approx(2.0 / len(blocks(traced))))
    slower = LatencyModel(table, 1.0, 0.01).matched(traced, kernels / 2)
    assert (slower.scale, slower.per_block) == (pytest.approx(0.5), 0)
    with pytest.raises(CveffError, match="positive time"):
        LatencyModel(table).matched(traced, -1.0)


def test_fewer_channels_are_predicted_faster_without_building(table: BlockLatency) -> None:
    net = cveff.create("small_resnet_s", num_classes=3, image_size=16)
    analysis = analyze(net.module, net.spec.input)
    model, times = LatencyModel(table), []
    for share in (1.0, 0.8, 0.55, 0.3):
        keep = {group.name: np.arange(group.size) < group.size * share for group in analysis.groups}
        times.append(model.predict(analysis.trace, analysis.shapes(keep)))
    assert times == sorted(times, reverse=True)
    shapes = analysis.shapes(keep)
    assert model.anchored(analysis.trace, 7.0, shapes).predict(analysis.trace, shapes) == pytest.approx(7.0)
    measured = table.num_measured
    assert model.predict(analysis.trace, analysis.shapes(keep)) == times[-1]
    assert table.num_measured == measured


def test_bad_fits_say_what_to_do(table: BlockLatency) -> None:
    with pytest.raises(CveffError, match="two models or more and a time each, not 1 and 1"):
        LatencyModel.fit(table, networks(1), [1.0])
    with pytest.raises(CveffError, match="two models or more and a time each, not 3 and 2"):
        LatencyModel.fit(table, networks(3), [1.0, 2.0])
    with pytest.raises(CveffError, match="not a positive number"):
        LatencyModel.fit(table, networks(2), [1.0, 0.0])
