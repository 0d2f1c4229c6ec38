"""`apply`: a new model each time, requirements checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import cveff
from cveff.errors import StepError
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
