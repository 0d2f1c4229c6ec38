"""A run that grows: it learns, resumes to the bit, carries the optimizer, and ends without masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cveff
from cveff.data import Augmentation, Data
from cveff.data import load as load_data
from cveff.errors import CheckpointError, CveffError, RecipeError, TrainingError
from cveff.log import FileLog
from cveff.model import Model
from cveff.recipe import parse_recipe
from cveff.runtime.input_spec import InputSpec
from cveff.train import Growth, Train
from cveff.train.growth.carry import carry_optimizer
from cveff.train.growth.growing import fresh, grown_from
from cveff.train.growth.masks import masked_paths
from cveff.train.growth.sizes import specs_of
from cveff.train.optimizers import ScheduledOptimizers, build_optimizer

VIT = {"patch_size": 2, "embed_dim": 16, "num_heads": 2, "depth": 1, "drop_path_rate": 0.1}
GROW = (
    Growth(at=0.3, depth=2, mask_steps=2),
    Growth(at=0.6, width=32, heads=4, mlp_ratio=5.0, image_size=8, mask_steps=3),
)
SETTINGS = Train(
    epochs=4,
    batch_size=64,
    optimizer="adamw",
    learning_rate=2e-3,
    ema=0.9,
    clip_norm=1.0,
    precision="fp32",
    grow=GROW,
    augmentation=Augmentation(crop_padding=1),
)


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(320)), val=data.val.subset(np.arange(100)))


def vit(data: Data, size: int = 6, **arguments: Any) -> Model:
    torch.manual_seed(0)
    spec = InputSpec(size=(size, size), channels=1, mean=(0.3,), std=(0.35,))
    return cveff.create(
        "vit_tiny_patch16_224", labels=data.labels, input=spec, timm_arguments={**VIT, **arguments}
    )


def equal(a: Model, b: Model) -> bool:
    first, second = a.module.state_dict(), b.module.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_grows_on_schedule_and_ends_plain(digits: Data, tmp_path: Path) -> None:
    lines: list[str] = []

    class Listening(cveff.progress.Silent):
        def message(self, text: str) -> None:
            lines.append(text)

    model = cveff.apply(vit(digits), SETTINGS, data=digits, folder=tmp_path, progress=Listening())
    assert [line.split(" to ")[0] for line in lines if "grown" in line] == [
        "grown before step 6",
        "grown before step 12",
    ]
    assert model.spec.arguments["depth"] == 2 and model.spec.arguments["embed_dim"] == 32
    assert model.spec.input.size == (8, 8)
    assert list(masked_paths(model.module)) == []
    cveff.save(model, tmp_path / "model")
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(cveff.load(tmp_path / "model").module(images), model.module(images))
    assert cveff.load(tmp_path / "best").spec == model.spec  # earlier networks are not kept


def test_an_event_at_0_begins_smaller_and_ends_with_the_model(digits: Data) -> None:
    model = vit(digits, size=8, depth=2)
    grow = (Growth(at=0, depth=1, width=8, heads=1, image_size=4), *GROW[:1])
    with pytest.raises(TrainingError, match="ends with another network"):
        cveff.apply(model, replace(SETTINGS, grow=grow), data=digits)
    grow = (*grow, Growth(at=0.6, width=16, heads=2, image_size=8, mask_steps=3))
    grown = cveff.apply(model, replace(SETTINGS, grow=grow), data=digits)
    assert grown.spec == model.spec
    assert list(masked_paths(grown.module)) == []


# At the end of epochs before, under and behind masks.
@pytest.mark.parametrize(("optimizer", "after"), [("adamw", 6), ("sgd", 11), ("muon", 14), ("adamw", 16)])
def test_a_resumed_run_is_bit_identical(digits: Data, tmp_path: Path, optimizer: str, after: int) -> None:
    settings = replace(SETTINGS, optimizer=optimizer, learning_rate=None, keep="last")
    if after == 11:
        settings = replace(settings, checkpoint_minutes=1e-9)  # the state after every step, masks and all
    whole = cveff.apply(vit(digits), settings, data=digits)

    class KilledError(Exception):
        pass

    class Killing(cveff.progress.Silent):
        def track(self, items: Any, description: str, total: int | None = None) -> Any:
            for index, item in enumerate(items):
                if index == after:
                    raise KilledError
                yield item

    with pytest.raises(KilledError):
        cveff.apply(vit(digits), settings, data=digits, folder=tmp_path, progress=Killing())
    resumed = cveff.apply(vit(digits), settings, data=digits, folder=tmp_path, resume=True)
    assert equal(whole, resumed)
    if after == 6:
        with pytest.raises(CheckpointError, match="grow"):
            other = replace(settings, grow=GROW[:1])
            cveff.apply(vit(digits), other, data=digits, folder=tmp_path, resume=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_optimizer_state_is_kept_for_old_weights_and_fresh_for_new(digits: Data, optimizer: str) -> None:
    model = vit(digits)

    def built(of: Model) -> ScheduledOptimizers:
        return build_optimizer(of.module, optimizer, 1e-2, 0.0, 0.9)

    old = built(model)
    for _ in range(2):
        old.zero_grad()
        model.module(torch.randn(4, 1, 6, 6)).square().sum().backward()
        old.step()
    (spec,) = specs_of(model, [Growth(at=0.5, width=32, heads=4, depth=2)])
    grown = grown_from(model, spec, 0)
    new = built(grown.model)
    carry_optimizer(old, new, (model.module, grown.model.module), grown.placement)
    name = "blocks.0.attn.qkv.weight"
    key = {"sgd": "momentum_buffer", "adamw": "exp_avg", "muon": "momentum_buffer"}[optimizer]
    states = [
        _state(optimizers, item.module.get_parameter(name))
        for optimizers, item in ((old, model), (new, grown.model))
    ]
    before, after = (state[key].view(3, heads, 8, -1) for state, heads in zip(states, (2, 4), strict=True))
    assert before.abs().min() > 0
    assert torch.equal(after[:, :2, :, :16], before)
    assert not after[:, 2:].any() and not after[..., 16:].any()
    assert states[0].get("step") == states[1].get("step")
    assert not _state(new, grown.model.module.get_parameter("blocks.1.attn.qkv.weight"))
    new.zero_grad()
    grown.model.module(torch.randn(4, 1, 6, 6)).square().sum().backward()
    new.step()


def _state(optimizers: ScheduledOptimizers, parameter: torch.nn.Parameter) -> Any:
    for optimizer in optimizers.optimizers:
        for kernel, state in getattr(optimizer, "kernel_states", list)():
            if kernel is parameter:
                return state
        if parameter in optimizer.state:
            return optimizer.state[parameter]
    return {}


def test_the_moving_average_grows_with_the_network(digits: Data, tmp_path: Path) -> None:
    """The last validated figure is that of the plain, averaged network that is kept."""
    import json

    from cveff.train.evaluate import evaluate

    with FileLog(tmp_path) as log:
        model = cveff.apply(vit(digits), replace(SETTINGS, keep="last"), data=digits, log=log)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    figures = evaluate(model.module, digits.val, model.spec.input)
    assert lines[-1]["val/loss"] == pytest.approx(figures["loss"], rel=1e-6)
    assert [line["growth/difference"] < 1e-6 for line in lines if "growth/difference" in line] == [True, True]


def test_new_weights_of_a_run_derive_from_its_seed(digits: Data) -> None:
    (spec,) = specs_of(vit(digits), [Growth(at=0.5, depth=3)])
    weights = [fresh(spec, seed).module.blocks[2].mlp.fc1.weight for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("grow", "words"),
    [
        ((GROW[1], GROW[0]), "not after the event before"),
        ((Growth(at=0.2, depth=3), Growth(at=0.4, depth=2)), "networks only grow"),
        ((Growth(at=0, depth=1),), "add one that grows"),
        ((Growth(at=0.3, depth=2, mask_steps=7), GROW[1]), "mask_steps = 7"),
        ((Growth(at=0.9, depth=2, mask_steps=7),), "the run ends"),
        ((Growth(at=0.01, depth=2, mask_steps=2),), "begins before step 0"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(digits: Data, grow: tuple[Growth, ...], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        cveff.apply(vit(digits), replace(SETTINGS, grow=grow), data=digits)


@pytest.mark.parametrize(
    "values",
    [
        {"at": 1.0, "depth": 2},
        {"at": -0.1, "depth": 2},
        {"at": 0.5},
        {"at": 0.5, "depth": 0},
        {"at": 0.5, "width": (8, -1)},
        {"at": 0.5, "depth": 2, "mask_steps": 0},
    ],
)
def test_events_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="growth"):
        Growth(**values)


def test_growth_to_a_smaller_size_is_refused_before_training(digits: Data) -> None:
    with pytest.raises(CveffError, match="only adds"):
        cveff.apply(vit(digits, depth=3), replace(SETTINGS, grow=GROW[:1]), data=digits)


def test_a_recipe_grows() -> None:
    grow = [{"at": 0.3, "depth": 12}, {"at": 0.5, "width": [16, 32], "mask_steps": 10}]
    recipe = parse_recipe({"data": {"source": "digits"}, "train": {"grow": grow}})
    assert recipe.train is not None
    assert recipe.train.grow == (Growth(at=0.3, depth=12), Growth(at=0.5, width=(16, 32), mask_steps=10))
    assert parse_recipe(recipe.to_json()) == recipe
    with pytest.raises(RecipeError, match=r"train\.grow\[0\]\.dept: unknown key; did you mean 'depth'"):
        parse_recipe({"data": {"source": "digits"}, "train": {"grow": [{"at": 0.3, "dept": 12}]}})
    with pytest.raises(RecipeError, match=r"train\.grow\[1\]\.depth is 3"):
        parse_recipe(
            {
                "data": {"source": "digits"},
                "train": {"grow": [{"at": 0.3, "depth": 4}, {"at": 0.5, "depth": 3}]},
            }
        )
