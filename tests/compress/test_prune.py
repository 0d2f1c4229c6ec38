"""`Prune`: every goal is met and not overshot by much, what is saved loads bit-equal, and each mistake is named."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import cveff
import cveff.data
from cveff.compress import Distill, Prune, prune_plan, sensitivity
from cveff.compress.analysis import analyze
from cveff.compress.batch_norm import recalibrate_batch_norm
from cveff.compress.blocks import macs
from cveff.compress.importance import score
from cveff.compress.latency_goal import LatencyGoal
from cveff.compress.samples import samples
from cveff.compress.sensitivity import divergence, measured_curves, summed_curves
from cveff.compress.sizes import Sizes
from cveff.compress.unreachable import UnreachableError
from cveff.data.dataset import Data
from cveff.errors import StepError
from cveff.model import Model
from cveff.progress import Silent
from cveff.steps import Run
from cveff.target import Target
from cveff.train import Train

ZOO = Path(__file__).parents[2] / "model_zoo" / "weights" / "digits"


@pytest.fixture(scope="module")
def data() -> Data:
    return cveff.data.load("digits", seed=0)


@pytest.fixture(scope="module")
def trained() -> Model:
    return cveff.load(ZOO)


def flops(model: Model) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.module.eval()(torch.zeros(1, model.spec.input.channels, *model.spec.input.size))
    return counter.get_total_flops()


class MacsTimer:
    """A device whose time is proportional to operations, with a fixed cost a call."""

    engine, threads = "onnxruntime", 1

    def __init__(self, fixed: float = 0.0) -> None:
        self.fixed, self.asked = fixed, 0

    def milliseconds(self, models: Mapping[str, Model]) -> dict[str, float]:
        self.asked += 1
        return {name: self.fixed + flops(model) / 1e6 for name, model in models.items()}


@pytest.mark.parametrize(
    ("goal", "settings"),
    [
        ("macs", {}),
        ("parameters", {}),
        ("macs", {"sensitivity": False}),
        ("macs", {"scope": "local"}),
        ("parameters", {"scope": "isomorphic"}),
        ("macs", {"importance": "magnitude", "sensitivity": False, "compensate": False}),
    ],
)
def test_goals_that_are_counted_are_met(
    goal: str, settings: dict[str, Any], trained: Model, data: Data
) -> None:
    small = cveff.apply(trained, Prune(**{goal: 0.6}, images=64, round_to=2, **settings), data=data)
    left = flops(small) / flops(trained) if goal == "macs" else small.num_parameters / trained.num_parameters
    assert 0.45 < left <= 0.601
    assert [edit.kind for edit in small.spec.edits][-1] == "prune_channels"


def test_a_ratio_takes_that_share_of_every_group(trained: Model, data: Data) -> None:
    analysis = analyze(trained.module, trained.spec.input)
    small = cveff.apply(trained, Prune(ratio=0.5, scope="local", images=64, round_to=1), data=data)
    left = {group.name: group.size for group in analyze(small.module, small.spec.input).groups}
    assert left == {group.name: round(group.size / 2) for group in analysis.groups}


def test_the_targets_multiple_is_what_channels_are_rounded_to(trained: Model) -> None:
    def sizes(**settings: Any) -> set[int]:
        step = Prune(ratio=0.4, importance="magnitude", compensate=False, **settings)
        run = Run(target=Target("wide", "", (("onnxruntime", "fp32"),), channel_multiple=16))
        kept = step.plan(trained, run).keep
        return {int(mask.sum()) for mask in kept.values()}

    assert all(size % 16 == 0 for size in sizes()) and any(size % 16 for size in sizes(round_to=1))
    assert sizes(round_to=16) == sizes()


def test_a_pruned_model_loads_bit_equal_and_is_pruned_again(
    trained: Model, data: Data, tmp_path: Path
) -> None:
    small = cveff.apply(trained, Prune(macs=0.7, images=64, rounds=2, round_to=2), data=data)
    cveff.save(small, tmp_path / "small")
    loaded = cveff.load(tmp_path / "small")
    images = torch.randn(2, trained.spec.input.channels, *trained.spec.input.size)
    assert torch.equal(loaded.module(images), small.module(images))
    assert len(loaded.spec.edits) == len(trained.spec.edits) + 2
    assert flops(loaded) <= 0.701 * flops(trained)


def test_the_given_model_is_untouched(trained: Model, data: Data) -> None:
    before = {name: value.clone() for name, value in trained.module.state_dict().items()}
    cveff.apply(trained, Prune(macs=0.5, images=64), data=data)
    assert all(torch.equal(value, before[name]) for name, value in trained.module.state_dict().items())


def test_repair_keeps_more_of_the_accuracy(trained: Model, data: Data) -> None:
    def accuracy(**settings: Any) -> float:
        from cveff.pipeline import evaluate

        return evaluate(
            cveff.apply(trained, Prune(macs=0.5, round_to=2, images=256, **settings), data=data), data
        )

    assert accuracy() > accuracy(compensate=False) + 0.1


def test_recovery_trains_with_the_dense_parent(trained: Model, data: Data) -> None:
    from cveff.pipeline import evaluate

    recover = Distill(train=Train(epochs=3, batch_size=64, optimizer="adamw", learning_rate=2e-3))
    small = cveff.apply(trained, Prune(macs=0.4, round_to=2, images=128, recover=recover), data=data)
    assert evaluate(small, data) > 0.95


def test_latency_is_met_on_the_timer(trained: Model, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = _predicted_by_macs(monkeypatch, fixed=0.2)
    small = cveff.apply(trained, Prune(latency=0.6, images=64, round_to=2), data=data, timer=timer)
    times = timer.milliseconds({"dense": trained, "small": small})
    assert 0.93 * 0.6 <= times["small"] / times["dense"] <= 1.01 * 0.6
    assert timer.asked <= 10


def test_latency_in_milliseconds(trained: Model, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = _predicted_by_macs(monkeypatch, fixed=0.1)
    goal = 0.7 * timer.milliseconds({"dense": trained})["dense"]
    small = cveff.apply(trained, Prune(latency_ms=goal, images=64, round_to=2), data=data, timer=timer)
    assert timer.milliseconds({"small": small})["small"] <= 1.01 * goal


def test_an_unreachable_latency_says_what_can_be_reached(
    trained: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = _predicted_by_macs(monkeypatch, fixed=10.0)
    with pytest.raises(StepError, match=r"cannot be reached.*the least is 0\.8"):
        cveff.apply(trained, Prune(latency=0.5, images=64), data=data, timer=timer)


def test_where_the_table_sees_nothing_to_save_arithmetic_is_cut_and_measured(
    trained: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of tiny kernels hardly depend on their widths: a table of them may be flat where a network is not."""

    class Flat:
        def predict(self, trace: Any, shapes: Any = None) -> float:
            return 1.0

    timer = MacsTimer()
    monkeypatch.setattr(LatencyGoal, "make_predictor", staticmethod(lambda timer, reference: Flat()))
    small = cveff.apply(trained, Prune(latency=0.5, round_to=2), data=data, target="edge-cpu", timer=timer)
    assert 0.45 <= flops(small) / flops(trained) <= 0.505


def test_an_unreachable_count_says_what_can_be_reached(trained: Model, data: Data) -> None:
    with pytest.raises(StepError, match=r"cannot be reached.*is left"):
        cveff.apply(trained, Prune(macs=0.01, images=64, min_fraction=0.5), data=data)


def test_blocks_go_where_channels_alone_cannot_reach_the_goal(trained: Model, data: Data) -> None:
    narrow = Prune(macs=0.6, images=64, min_fraction=0.9)
    with pytest.raises(UnreachableError, match=r"cannot be reached.*allow depth=True") as without:
        cveff.apply(trained, narrow, data=data)
    small = cveff.apply(trained, dataclasses.replace(narrow, depth=True), data=data)
    assert flops(small) <= 0.601 * flops(trained)
    assert any(edit.kind == "drop_blocks" for edit in small.spec.edits)
    assert "residual blocks" not in str(without.value)
    with pytest.raises(UnreachableError, match=r"without [1-9] residual blocks, all that can go"):
        cveff.apply(trained, dataclasses.replace(narrow, macs=0.05, depth=True), data=data)


def test_no_block_goes_where_channels_cost_less(trained: Model, data: Data) -> None:
    """A tenth of the operations is cheap in channels, and every block of this network does something."""
    small = cveff.apply(trained, Prune(macs=0.9, images=64, depth=True, round_to=2), data=data)
    assert flops(small) <= 0.901 * flops(trained)
    assert not any(edit.kind == "drop_blocks" for edit in small.spec.edits)


def test_odd_images_choose_nothing(trained: Model, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    mark = torch.zeros(64, dtype=torch.bool)
    mark[[5, 40]] = True
    monkeypatch.setattr(prune_plan, "odd_images", lambda module, batches: mark)
    real = prune_plan.score

    def counted(module: nn.Module, groups: Any, criterion: Any, **given: Any) -> Any:
        seen.append(sum(len(images) for images, _ in given["batches"]))
        return real(module, groups, criterion, **given)

    monkeypatch.setattr(prune_plan, "score", counted)
    said: list[str] = []
    progress = Silent()
    monkeypatch.setattr(progress, "message", said.append)
    cveff.apply(trained, Prune(macs=0.8, images=64, round_to=2), data=data, progress=progress)
    assert seen == [62]
    assert said[0].startswith("2 of 64 images reach far larger values than the others")


def test_more_milliseconds_than_the_model_takes(
    trained: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = _predicted_by_macs(monkeypatch)
    with pytest.raises(StepError, match="already"):
        cveff.apply(trained, Prune(latency_ms=1e6, images=64), data=data, timer=timer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"takes one goal .* got none"),
        ({"macs": 0.5, "ratio": 0.5}, "got macs, ratio"),
        ({"latency": 1.0}, "latency is 1.0"),
        ({"latency": 1.5}, "latency is 1.5"),
        ({"macs": 0.0}, "macs is 0.0"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"latency_ms": 0.0}, "latency_ms is 0.0"),
        ({"macs": 0.5, "importance": "magic"}, "importance is 'magic'"),
        ({"macs": 0.5, "scope": "galactic"}, "scope is 'galactic'"),
        ({"macs": 0.5, "rounds": 0}, "rounds is 0"),
        ({"macs": 0.5, "round_to": 0}, "round_to is 0"),
        ({"macs": 0.5, "min_fraction": 1.0}, "min_fraction is 1.0"),
        ({"macs": 0.5, "images": 0}, "images is 0"),
        ({"ratio": 0.5, "depth": True}, "depth weighs blocks"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StepError, match=message):
        Prune(**settings)


def test_a_latency_needs_a_target(trained: Model, data: Data) -> None:
    with pytest.raises(StepError, match="pass target"):
        cveff.apply(trained, Prune(latency=0.5), data=data)
    assert Prune(latency_ms=3.0).requires == ("timer",)
    assert Prune(macs=0.5).requires == ()


def test_measuring_needs_images(trained: Model) -> None:
    with pytest.raises(StepError, match="pass data"):
        cveff.apply(trained, Prune(macs=0.5))
    small = cveff.apply(
        trained, Prune(macs=0.5, importance="magnitude", sensitivity=False, compensate=False, round_to=2)
    )
    assert flops(small) <= 0.501 * flops(trained)


def test_a_network_without_groups(data: Data) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.flatten(1))

    model = cveff.load(ZOO)
    spec = dataclasses.replace(model.spec.input, size=(8, 8))
    flat = Model(dataclasses.replace(model.spec, input=spec), Flat())
    with pytest.raises(StepError, match=r"no channels that could be pruned.*output"):
        cveff.apply(
            flat, Prune(macs=0.5, importance="magnitude", sensitivity=False, compensate=False), data=data
        )


def test_sizes_agree_with_masks_and_operations_with_torch(trained: Model) -> None:
    analysis = analyze(trained.module, trained.spec.input)
    sizes = Sizes(analysis)
    random = np.random.default_rng(0)
    keep = {group.name: np.arange(group.size) < random.integers(1, group.size) for group in analysis.groups}
    counts = {name: int(mask.sum()) for name, mask in keep.items()}
    assert sizes.shapes(counts) == analysis.shapes(keep)
    small = Model(trained.spec, analysis.edit(keep, trained.module).apply(cveff.load(ZOO).module))
    assert sizes.parameters(counts) == small.num_parameters
    assert 2 * macs(analysis.trace, sizes.shapes(counts)) == flops(small)


def test_curves_start_at_nothing_and_never_fall(trained: Model, data: Data) -> None:
    analysis = analyze(trained.module, trained.spec.input)
    assert data.train is not None
    batches = samples(data.train, trained.spec.input, 64)
    scores = score(trained.module, analysis.groups, "activation", batches=batches)
    for curves in (
        measured_curves(trained.module, analysis, scores, batches, round_to=2),
        summed_curves(analysis.groups, scores, is_comparable=False, round_to=2),
    ):
        for group in analysis.groups:
            curve = curves[group.name]
            assert curve.counts[0] == group.size and curve.losses[0] == 0
            assert (np.diff(curve.losses) >= 0).all() and curve.losses[-1] > 0


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_what_others_can_replace_costs_little(
    trained: Model, data: Data, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """Half of a layer's channels are copies of the others: gone, they can be repaired without loss."""
    module = copy.deepcopy(trained.module)
    analysis = analyze(module, trained.spec.input)
    group = next(group for group in analysis.groups if group.name == "stages.0.0.conv1.conv")
    half = group.size // 2
    state = module.state_dict()
    for member in group.members:
        if member.role != "in":
            state[member.parameter][half:] = state[member.parameter][:half]
    batches = samples(data.train, trained.spec.input, 64)  # type: ignore[arg-type]
    recalibrate_batch_norm(module, batches)
    scores = {other.name: np.arange(other.size, 0, -1.0) for other in analysis.groups}
    monkeypatch.setattr(sensitivity, "MEMORY", memory)
    alone, repaired = (
        measured_curves(module, analysis, scores, batches, round_to=2, repair=repair)
        for repair in (False, True)
    )
    at = alone[group.name].counts.index(half)
    assert alone[group.name].losses[at] > 1e-3
    assert repaired[group.name].losses[at] < 1e-3 * alone[group.name].losses[at]


def test_an_image_counts_no_more_than_no_answer_and_the_worst_not_at_all() -> None:
    torch.manual_seed(0)
    images = torch.randn(100, 10, 1, 1)
    dense = [F.log_softmax(images.flatten(1), 1)]

    class Answers(nn.Module):
        def __init__(self, changed: dict[int, float]) -> None:
            super().__init__()
            self.changed = changed

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = x.flatten(1).clone()
            for index, value in self.changed.items():
                logits[index] = -value * logits[index]
            return logits

    def moved(changed: dict[int, float]) -> float:
        return divergence(Answers(changed), [(images, None)], dense, "some")

    assert moved({}) == 0
    assert moved(dict.fromkeys(range(5), 1000.0)) == 0, "five of a hundred are not looked at"
    assert moved(dict.fromkeys(range(24), 1000.0)) == pytest.approx(19 / 95 * math.log(10))
    with pytest.raises(StepError, match="not finite once part of some is gone"):
        moved({0: float("nan")})


def _predicted_by_macs(monkeypatch: pytest.MonkeyPatch, fixed: float = 0.0) -> MacsTimer:
    """A timer of a device that is predicted by operations, so that no kernel is measured in a test."""

    class ByMacs:
        def predict(self, trace: Any, shapes: Any = None) -> float:
            return 2 * macs(trace, shapes) / 1e6  # knows nothing of the fixed cost

    monkeypatch.setattr(LatencyGoal, "make_predictor", staticmethod(lambda timer, reference: ByMacs()))
    return MacsTimer(fixed)
