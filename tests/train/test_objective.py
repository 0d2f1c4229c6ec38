"""Laws of objectives: what they add is trained, resumed and thrown away; what they keep stays; NaN is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cveff
from cveff.data import Data
from cveff.data import load as load_data
from cveff.errors import CheckpointError, TrainingError
from cveff.log import FileLog
from cveff.model import Model
from cveff.runtime.input_spec import InputSpec
from cveff.steps import Run
from cveff.train import Train
from cveff.train.loop import fit
from cveff.train.objective import CrossEntropy

SETTINGS = Train(epochs=2, batch_size=64, learning_rate=0.05, ema=0.9, precision="fp32", warmup_epochs=0)


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(256)), val=data.val.subset(np.arange(60)))


def tiny(data: Data, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    spec = InputSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.35,))
    return cveff.create("small_resnet_s", labels=data.labels, input=spec, widths=[4, 8], depths=[1, 1])


def equal(a: Model, b: Model) -> bool:
    first, second = a.module.state_dict(), b.module.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TwoHeads(CrossEntropy):
    """Cross-entropy of the network's logits and of a second head over them."""

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__(0.1)
        self.weight = weight
        self.extra = nn.Linear(10, 10)
        nn.init.eye_(self.extra.weight)
        nn.init.zeros_(self.extra.bias)

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        assert self.extra is not None
        logits = module(images).float()
        return self.of_logits(logits, targets) + self.weight * self.of_logits(self.extra(logits), targets)

    def identity(self) -> Mapping[str, Any]:
        return {"weight": self.weight}


class ZeroColumn(CrossEntropy):
    """Keeps the classifier's first column at zero."""

    def after_step(self, module: nn.Module, step: int, total_steps: int) -> None:
        assert 1 <= step <= total_steps
        with torch.no_grad():
            module.fc.weight[:, 0] = 0


def test_no_objective_is_cross_entropy(digits: Data) -> None:
    runs = [
        fit(tiny(digits), SETTINGS, Run(data=digits), objective) for objective in (None, CrossEntropy(0.1))
    ]
    assert equal(*runs)
    assert not equal(runs[0], fit(tiny(digits), SETTINGS, Run(data=digits), CrossEntropy(0.0)))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_extra_parameters_learn_and_resume_bit_for_bit(digits: Data, tmp_path: Path, optimizer: str) -> None:
    settings = replace(SETTINGS, optimizer=optimizer, learning_rate=None, keep="last", clip_norm=1.0)
    whole = TwoHeads()
    model = fit(tiny(digits), settings, Run(data=digits), whole)
    assert not torch.equal(whole.extra.weight, TwoHeads().extra.weight)
    assert model.module.state_dict().keys() == tiny(digits).module.state_dict().keys()

    class KilledError(Exception):
        pass

    class KillingLog(FileLog):
        def write(self, step: int, figures: object) -> None:
            if step > 4:
                raise KilledError
            super().write(step, figures)

    with pytest.raises(KilledError):
        fit(tiny(digits), settings, Run(data=digits, folder=tmp_path, log=KillingLog(tmp_path)), TwoHeads())
    again = TwoHeads()
    resumed = fit(tiny(digits, seed=4), settings, Run(data=digits, folder=tmp_path, resume=True), again)
    assert equal(model, resumed)
    assert torch.equal(whole.extra.weight, again.extra.weight)


def test_resuming_with_another_objective_is_refused(digits: Data, tmp_path: Path) -> None:
    fit(tiny(digits), SETTINGS, Run(data=digits, folder=tmp_path), TwoHeads())
    run = Run(data=digits, folder=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"objective\.weight: 0\.5 then, 0\.7 now"):
        fit(tiny(digits), SETTINGS, run, TwoHeads(0.7))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_put_back_after_a_step_holds_in_what_is_kept(digits: Data, ema: float) -> None:
    model = fit(tiny(digits), replace(SETTINGS, ema=ema), Run(data=digits), ZeroColumn())
    assert not model.module.fc.weight[:, 0].any()
    assert model.module.fc.weight[:, 1].all()


def test_a_gradient_that_is_not_finite_names_its_parameter(digits: Data) -> None:
    class RootAtZero(CrossEntropy):  # finite, with the gradient 0 · inf
        def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
            return super().loss(module, images, targets) + (0 * module.fc.bias).sum().sqrt()

    with pytest.raises(TrainingError, match=r"gradient of fc\.bias is not finite at step 1.*learning_rate"):
        fit(tiny(digits), SETTINGS, Run(data=digits), RootAtZero())


def test_label_smoothing_of_logits_matches_torch() -> None:
    logits, targets = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 4
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1) * 5
    torch.testing.assert_close(CrossEntropy(0.1).of_logits(logits, targets), expected)
