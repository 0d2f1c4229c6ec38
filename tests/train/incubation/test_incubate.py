"""Laws of incubation: one module is ordinary training, what is frozen stays to the bit, tasks can be done anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cveff
from cveff.data import Data
from cveff.errors import CheckpointError, CveffError, MissingDependencyError, RecipeError, StepError
from cveff.model import Model
from cveff.recipe import parse_recipe, recipe_for, with_assembly
from cveff.train import Train
from cveff.train.flops import training_flops
from cveff.train.incubation import Incubate, executor
from cveff.train.incubation.parts import divide
from cveff.train.incubation.task import Phase, do
from cveff.train.state import load_state

TRAIN = Train(epochs=2, batch_size=32, optimizer="adamw", precision="fp32", warmup_epochs=0.0)
NONE = replace(TRAIN, epochs=0)


def same(a: Model, b: Model) -> bool:
    first, second = a.module.state_dict(), b.module.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def outcome(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_state(folder / name / "outcome.safetensors")["tensors"]


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_one_module_is_ordinary_training(network: Callable[[str], Model], digits: Data, name: str) -> None:
    model = network(name)
    step = Incubate(modules=1, incubate=TRAIN, tune=NONE)
    assert same(cveff.apply(model, step, data=digits, seed=3), cveff.apply(model, TRAIN, data=digits, seed=3))


@pytest.mark.parametrize("name", ["vit", "resnet", "convnext"])
def test_what_is_frozen_stays_to_the_bit_and_modules_are_assembled(
    network: Callable[[str], Model], digits: Data, tmp_path: Path, name: str
) -> None:
    model = network(name)
    train = replace(TRAIN, epochs=1, ema=0.9)
    assembled = cveff.apply(
        model, Incubate(3, meta=train, incubate=train, tune=NONE), data=digits, folder=tmp_path
    )
    parts = divide(model.module, model.spec.input, 3)
    meta = outcome(tmp_path, "meta")
    result, given = assembled.module.state_dict(), model.module.state_dict()
    for index, part in enumerate(parts):
        trained = outcome(tmp_path, f"module-{index}")
        assert trained.keys() == part.tensors
        best = cveff.load(tmp_path / f"module-{index}" / "best").module.state_dict()
        others = [key for key in best if key not in part.tensors]
        assert others and all(
            torch.equal(best[key], meta[key]) for key in others
        )  # batch norms' statistics too
        assert all(torch.equal(result[key], trained[key]) for key in trained)
        moved = [
            key
            for key in trained
            if trained[key].is_floating_point() and not torch.equal(trained[key], given[key])
        ]
        assert any(part.is_in_blocks(key) for key in moved)
    assert assembled.spec == model.spec
    cveff.save(assembled, tmp_path / "model")
    images = torch.randn(2, 1, *model.spec.input.size)
    assert torch.equal(cveff.load(tmp_path / "model").module(images), assembled.module(images))


def test_frozen_blocks_drop_no_paths(network: Callable[[str], Model], digits: Data, tmp_path: Path) -> None:
    """During a module's training the others are in evaluation mode, dropout and drop path included."""
    from cveff.train.incubation.task import Incubation

    model = network("vit", drop_rate=0.3, pos_drop_rate=0.3)
    parts = divide(model.module, model.spec.input, 3)
    module = model.module.train()
    images, targets = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    Incubation(0.0, (parts[0], parts[2])).loss(module, images, targets)
    active = {path for path, part in module.named_modules() if part.training and path}
    assert {path for path in active if path.startswith("blocks.")} == {
        path
        for path, _ in module.named_modules()
        if path.startswith(tuple(f"{block}." for block in parts[1].blocks)) or path in parts[1].blocks
    }
    assert not active & {"pos_drop", "head_drop", "patch_embed.proj", "norm", "head"}


def test_a_stopped_incubation_goes_on_to_the_same_weights(
    network: Callable[[str], Model], digits: Data, tmp_path: Path
) -> None:
    model = network("resnet")
    step = Incubate(2, meta=TRAIN, incubate=TRAIN, tune=replace(TRAIN, epochs=1))
    whole = cveff.apply(model, step, data=digits, folder=tmp_path / "whole")

    class KilledError(Exception):
        pass

    class Killing(cveff.progress.Silent):
        count = 0

        def message(self, text: str) -> None:
            if text.startswith("epoch"):
                self.count += 1
                if self.count == 5:  # within the second module
                    raise KilledError

    with pytest.raises(KilledError):
        cveff.apply(model, step, data=digits, folder=tmp_path / "run", progress=Killing())
    first = (tmp_path / "run" / "module-0" / "outcome.safetensors").stat().st_mtime_ns
    resumed = cveff.apply(model, step, data=digits, folder=tmp_path / "run", resume=True)
    assert same(whole, resumed)
    assert (tmp_path / "run" / "module-0" / "outcome.safetensors").stat().st_mtime_ns == first
    other = replace(step, incubate=replace(TRAIN, learning_rate=0.5))
    with pytest.raises(CheckpointError, match="learning_rate"):
        cveff.apply(model, other, data=digits, folder=tmp_path / "run", resume=True)


def test_a_process_does_the_same_work(network: Callable[[str], Model], digits: Data, tmp_path: Path) -> None:
    model, train = network("vit"), replace(TRAIN, epochs=1)
    step = Incubate(1, incubate=train, tune=NONE, executor="processes")
    apart = cveff.apply(model, step, data=digits, folder=tmp_path)
    for key, value in cveff.apply(model, train, data=digits).module.state_dict().items():
        # Another number of threads may add in another order.
        torch.testing.assert_close(apart.module.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_ray_is_asked_for_by_name(
    network: Callable[[str], Model], digits: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tasks go to Ray as they are; without Ray the message says what to install."""
    import sys
    from types import SimpleNamespace

    step = Incubate(1, incubate=replace(TRAIN, epochs=1), tune=NONE, executor="ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"cveff\[ray\]"):
        cveff.apply(network("vit"), step, data=digits)
    calls: list[Any] = []

    def remote(**options: Any) -> Any:
        calls.append(options)
        return lambda function: SimpleNamespace(remote=function)

    fake = SimpleNamespace(init=lambda **options: calls.append(options), remote=remote, get=list)
    monkeypatch.setitem(sys.modules, "ray", fake)
    model = cveff.apply(network("vit"), step, data=digits)
    assert calls == [{"ignore_reinit_error": True}, {"num_gpus": 0}]
    assert same(model, cveff.apply(network("vit"), replace(step, executor="turn"), data=digits))
    assert executor._device(torch.device("cpu"), 1) == torch.device("cpu")


def test_the_record_tells_operations_and_the_critical_path(
    network: Callable[[str], Model], digits: Data, tmp_path: Path
) -> None:
    model, train = network("vit"), replace(TRAIN, epochs=1)
    step = Incubate(3, meta=train, incubate=train, tune=train)
    cveff.apply(model, step, data=digits, folder=tmp_path)
    record = json.loads((tmp_path / "incubation.json").read_text())
    phases = record["phases"]
    assert list(phases) == ["meta", "module-0", "module-1", "module-2", "tune"]
    whole = training_flops(model.module, model.spec.input) * 128
    assert phases["tune"]["flops"] == whole
    # The last module's gradients end where it begins; the first one's run through everything.
    assert phases["module-2"]["flops"] < phases["module-0"]["flops"] < whole
    assert record["flops"] == sum(phase["flops"] for phase in phases.values())
    apart = [phases[f"module-{index}"]["seconds"] for index in range(3)]
    along = phases["meta"]["seconds"] + phases["tune"]["seconds"]
    assert record["seconds"] == pytest.approx(sum(apart) + along)
    assert record["critical_path_seconds"] == pytest.approx(max(apart) + along)


def test_operations_are_counted_by_hand() -> None:
    from cveff.runtime.input_spec import InputSpec

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(12, 5), torch.nn.Linear(5, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x.flatten(1)))

    module, spec = Two(), InputSpec(size=(2, 2), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    first, second = 2 * 12 * 5, 2 * 5 * 7
    assert training_flops(module, spec) == first * 2 + second * 3  # the images need no gradient
    module.first.requires_grad_(False)
    assert training_flops(module, spec) == first + second * 2
    assert module.training and module.second.weight.grad is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules": 0}, "modules is 0"),
        ({"executor": "threads"}, "executor is 'threads'"),
        ({"workers": -1}, "workers is -1"),
        ({"meta": NONE}, r"meta\.epochs is 0"),
        ({"incubate": NONE}, r"incubate\.epochs is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StepError, match=words):
        Incubate(**settings)


def test_a_phase_without_its_meta_model_says_so(
    network: Callable[[str], Model], digits: Data, tmp_path: Path
) -> None:
    model = network("vit")
    cveff.save(model, tmp_path / "start")
    parts = divide(model.module, model.spec.input, 2)
    with pytest.raises(CveffError, match="meta"):
        do(Phase("module-0", tmp_path, parts, 0, TRAIN, digits, 0, torch.device("cpu"), False))


def test_recipes_and_the_command_line_incubate() -> None:
    step = {"kind": "incubate", "modules": 3, "incubate": {"epochs": 2}}
    recipe = parse_recipe({"data": {"source": "digits"}, "steps": [step]})
    assert recipe.steps == (Incubate(3, incubate=Train(epochs=2)),)
    assert parse_recipe(recipe.to_json()) == recipe
    assembled = with_assembly(recipe_for("digits", epochs=30), 4)
    (first, *_) = assembled.steps
    assert isinstance(first, Incubate) and first.modules == 4
    assert (first.meta.epochs, first.incubate.epochs, first.tune.epochs) == (30, 10, 10)
    assert parse_recipe(assembled.to_json()) == assembled
    with pytest.raises(RecipeError, match="--assemble has nothing to divide"):
        with_assembly(recipe, 4)
    with pytest.raises(RecipeError, match="train: is missing"):
        parse_recipe({"data": {"source": "digits"}, "steps": [{"kind": "fold_batch_norm"}, step]})
