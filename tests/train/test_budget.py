"""Laws of a budget: it ends on time, the schedule ends with it, and it says what it bought."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cveff
from cveff.data import Augmentation, Data
from cveff.data import load as load_data
from cveff.errors import RecipeError, TrainingError
from cveff.pipeline import run
from cveff.recipe import parse_recipe, recipe_for, with_budget, with_epochs
from cveff.steps import Clock
from cveff.train import Train
from cveff.train.budget import EVALUATION_SHARE, Budget, Reserve, duration, parse_duration
from cveff.train.loop import SUMMARY
from cveff.train.schedule import learning_rate_factor

SETTINGS = Train(
    budget="1.5s",
    batch_size=64,
    learning_rate=0.05,
    precision="fp32",
    augmentation=Augmentation(),
    keep="last",
)


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits", seed=0)


def tiny(data: Data, seed: int = 0) -> cveff.Model:
    torch.manual_seed(seed)
    return cveff.create(
        "small_resnet_s", labels=data.labels, image_size=8, channels=1, widths=[4, 8], depths=[1, 1]
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("1m2s", 62), ("0.5s", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert parse_duration(duration(seconds)) == np.ceil(seconds)


@pytest.mark.parametrize("text", ["", "10", "ten minutes", "-5s", "0m", "5m10", "1s1m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(TrainingError, match=r"train\.budget"):
        Train(budget=text)


@pytest.mark.parametrize("slow", [1.0, 2.0, 0.5])
def test_it_ends_on_time_when_the_machine_changes_its_speed(slow: float) -> None:
    now = Hand()
    budget = Budget("60s", Clock(now() - 5), now=now)
    budget.begin(Reserve(evaluation=3.0, saving=1.0), step_seconds=0.3)
    shares = []
    while not budget.is_over:
        shares.append(budget.share)
        now.time += 0.1 if budget.elapsed < 30 else 0.1 * slow
        budget.after_steps()
    assert budget.elapsed <= 56
    assert 56 - budget.elapsed < 0.1 * slow + 1e-9  # not even one more step fitted
    assert shares == sorted(shares) and shares[0] == 0
    factors = [learning_rate_factor("triangular", share * 1e6, 10**6, 0) for share in shares]
    one_step = 0.1 * slow / (0.8 * (56 - 5))  # of the fall, which takes 0.8 of the time
    assert max(factors) > 0.99 and factors[-1] <= 2 * one_step


def test_the_plan_follows_the_speed_that_was_measured() -> None:
    now = Hand()
    budget = Budget("20s", None, now=now)
    budget.begin(Reserve(1.0, 0.5, 0.5), step_seconds=9.0 / 10)
    for seconds in (3.0, 0.4, 0.2, *[0.1] * 20):  # first steps allocate
        now.time += seconds
        budget.after_steps()
    assert budget.is_measured and budget.step_seconds == pytest.approx(0.1)
    assert budget.remaining_steps() == pytest.approx((18 - 5.6) / 0.1, abs=1)
    assert budget.plan(147, 64, 640) == (
        "budget 20s: 0 s before training, then 640 images/s for 18 s = 147 steps = 14.7 epochs; "
        "kept free: 1.0 s for evaluation, 0.5 s for saving, 0.5 s for what follows"
    )


def test_evaluations_stay_a_small_share() -> None:
    now = Hand()
    budget = Budget("100s", None, now=now)
    budget.begin(Reserve(evaluation=2.0, saving=0.0), step_seconds=0.1)
    spent = 0.0
    while not budget.is_over:
        now.time += 0.1
        budget.after_steps()
        if budget.affords_evaluation(spent):
            now.time += 2.0
            spent += 2.0
            budget.resume_steps()
    assert 0 < spent <= EVALUATION_SHARE * 100
    assert budget.elapsed <= 98


def test_a_budget_too_short_names_one_that_would_do() -> None:
    now = Hand()
    budget = Budget("10s", Clock(now() - 4), now=now)
    with pytest.raises(TrainingError, match=r"10s is too short.*4\.0 s went.*5\.0 s.*would do is 17s"):
        budget.begin(Reserve(evaluation=5.0, saving=1.0), step_seconds=0.3)
    Budget("17s", Clock(now() - 4), now=now).begin(Reserve(5.0, 1.0), 0.3)


def test_training_ends_with_its_budget_and_sums_up(digits: Data, tmp_path: Path) -> None:
    class Lines:
        def __init__(self) -> None:
            self.lines: list[str] = []

        def track(self, items, description: str, total: int | None = None):
            yield from items

        def message(self, text: str) -> None:
            self.lines.append(text)

    progress = Lines()
    settings = replace(SETTINGS, budget="5s")
    model = cveff.apply(tiny(digits), settings, data=digits, folder=tmp_path, progress=progress)
    figures = json.loads((tmp_path / SUMMARY).read_text())
    assert digits.train is not None
    assert figures["samples"] == 64 * figures["steps"] and figures["steps"] >= 10
    assert figures["epochs"] == pytest.approx(figures["samples"] / len(digits.train))
    assert figures["seconds"] <= 1.5 * 5  # a loaded machine may lose a step's time, not a run's
    assert figures["flops"] == pytest.approx(3 * figures["samples"] * _macs(model) * 2, rel=0.02)
    assert any(line.startswith("budget 5s: ") for line in progress.lines)
    assert "100% of the budget" in progress.lines[-1]
    assert not model.module.training


def _macs(model: cveff.Model) -> int:
    from cveff.compress.blocks import macs
    from cveff.compress.trace import trace

    return macs(trace(model.module, model.spec.input))


def test_a_resumed_run_has_only_what_is_left(digits: Data, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    class Killing:
        def write(self, step: int, figures: object) -> None:
            raise KilledError

        def rewind(self, step: int) -> None:
            pass

    settings = replace(SETTINGS, budget="2s", checkpoint_minutes=1e-9)
    with pytest.raises(KilledError):
        cveff.apply(tiny(digits), settings, data=digits, folder=tmp_path, log=Killing())
    from cveff.train.state import load_state

    state = load_state(tmp_path / "state.safetensors")
    assert 0 < state["begun"] <= state["compute"]["seconds"] < 2
    cveff.apply(tiny(digits), settings, data=digits, folder=tmp_path, resume=True)
    figures = json.loads((tmp_path / SUMMARY).read_text())
    assert figures["steps"] > state["step"] and figures["samples"] == 64 * figures["steps"]
    assert figures["seconds"] > state["compute"]["seconds"]


def test_resuming_a_finished_budget_trains_no_more(digits: Data, tmp_path: Path) -> None:
    first = cveff.apply(tiny(digits), SETTINGS, data=digits, folder=tmp_path)
    again = cveff.apply(tiny(digits, seed=3), SETTINGS, data=digits, folder=tmp_path, resume=True)
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name])


def test_too_short_to_evaluate_is_refused_before_training(digits: Data) -> None:
    with pytest.raises(TrainingError, match=r"too short.*the least that would do"):
        cveff.apply(tiny(digits), replace(SETTINGS, budget="0.001s"), data=digits)


def test_a_recipe_counts_from_the_commands_start_and_reports(tmp_path: Path) -> None:
    recipe = recipe_for("digits", {"model.arguments": {"widths": [4], "depths": [1]}}, budget="8s")
    assert recipe.train is not None and recipe.train.budget == "8s"
    assert parse_recipe(recipe.to_json()) == recipe
    result = run(recipe, out=tmp_path / "run", bundle=False)
    assert result.consumed["budget_seconds"] == 8
    # Everything up to the scored model lies in the budget: the training alone takes less.
    assert result.consumed["seconds"] < result.consumed["command_seconds"]
    assert result.to_json()["consumed"]["samples"] == result.consumed["samples"] > 0


def test_budget_and_epochs_contradict_each_other() -> None:
    with pytest.raises(RecipeError, match="--epochs and --budget"):
        recipe_for("digits", epochs=3, budget="1m")


def test_any_training_can_be_given_a_budget() -> None:
    assert with_budget(Train(patience=3), "1m") == Train(budget="1m")
    assert with_epochs(Train(budget="1m"), 30) == Train()
    with pytest.raises(TrainingError, match=r"train\.patience"):
        Train(budget="1m", patience=3)
    with pytest.raises(TrainingError, match=r"train\.epochs"):
        Train(budget="1m", epochs=0, warmup_epochs=0)
