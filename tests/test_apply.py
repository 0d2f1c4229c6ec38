"""`apply`: a new model each time, requirements checked before anything starts."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import cveff
from cveff.errors import CveffError, StepError
from cveff.export.timer import EngineTimer
from cveff.model import Model
from cveff.steps import Run, Step


@dataclass(frozen=True)
class Double:
    """A step for tests: double every parameter."""

    kind: ClassVar[str] = "double"
    requires: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: Model, run: Run) -> Model:
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.mul_(2)
        return model


@dataclass(frozen=True)
class NeedsTarget(Double):
    requires: ClassVar[tuple[str, ...]] = ("target",)


@dataclass(frozen=True)
class HalveFirst:
    """An edit for tests."""

    name: str
    kind: ClassVar[str] = "halve_first"

    def apply(self, module: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            module.get_parameter(self.name).div_(2)
        return module


@pytest.fixture
def model() -> Model:
    return cveff.create("small_resnet_s", num_classes=2, image_size=8)


def test_the_old_model_is_untouched_and_order_holds(model: Model) -> None:
    before = model.module.fc.weight.detach().clone()
    changed = cveff.apply(model, [Double(), HalveFirst("fc.weight"), Double()])
    assert torch.equal(changed.module.fc.weight, before * 2)
    assert torch.equal(model.module.fc.weight, before)
    assert changed.spec.edits == (HalveFirst("fc.weight"),)
    assert model.spec.edits == ()


def test_what_is_missing_is_said_before_any_step_starts(model: Model) -> None:
    started = []

    class Noted(Double):
        def __call__(self, model: Model, run: Run) -> Model:
            started.append(True)
            return model

    with pytest.raises(StepError, match=r"NeedsTarget needs target; pass target=…"):
        cveff.apply(model, [Noted(), NeedsTarget()])
    assert not started
    assert isinstance(cveff.apply(model, NeedsTarget(), target="edge-cpu"), Model)


def test_something_else_is_refused(model: Model) -> None:
    with pytest.raises(StepError, match="neither a step nor an edit"):
        cveff.apply(model, "prune")
    with pytest.raises(StepError, match="neither a step nor an edit"):
        cveff.apply(model, [Double])


def test_protocols_tell_steps_from_edits() -> None:
    assert isinstance(Double(), Step)
    assert not isinstance(HalveFirst("x"), Step)


@dataclass(frozen=True)
class Seen:
    """A step for tests: note what the run holds."""

    runs: list[Run]
    kind: ClassVar[str] = "seen"
    requires: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: Model, run: Run) -> Model:
        self.runs.append(run)
        return model


@dataclass(frozen=True)
class NeedsTimer(Double):
    requires: ClassVar[tuple[str, ...]] = ("timer", "teacher")


def test_the_teacher_is_the_model_that_came_in(model: Model) -> None:
    seen = Seen([])
    cveff.apply(model, [seen, Double(), seen])
    assert all(run.teacher is model for run in seen.runs)
    other = cveff.create("small_resnet_s", num_classes=2, image_size=8)
    cveff.apply(model, seen, teacher=other)
    assert seen.runs[-1].teacher is other


def test_a_target_brings_a_timer_that_is_closed_behind_the_steps(model: Model) -> None:
    seen = Seen([])
    cveff.apply(model, seen)
    assert seen.runs[-1].timer is None
    with pytest.raises(StepError, match=r"NeedsTimer needs target; pass target=…"):
        cveff.apply(model, NeedsTimer())
    cveff.apply(model, [NeedsTimer(), seen], target="edge-cpu")
    timer = seen.runs[-1].timer
    assert isinstance(timer, EngineTimer)
    assert timer.engine == "onnxruntime"
    with pytest.raises(CveffError, match="closed"):
        timer.milliseconds({"model": model})


def test_a_given_timer_is_used_and_left_open(model: Model) -> None:
    class Constant:
        def milliseconds(self, models):
            return dict.fromkeys(models, 1.0)

    timer, seen = Constant(), Seen([])
    cveff.apply(model, [NeedsTimer(), seen], timer=timer)
    assert seen.runs[-1].timer is timer


def test_importing_the_module_does_not_take_the_verb_away(model: Model) -> None:
    importlib.import_module("cveff.apply")
    assert isinstance(cveff.apply(model, Double()), Model)
    assert "steps" in inspect.signature(cveff.apply).parameters
