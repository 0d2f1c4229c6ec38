"""`EngineTimer`: times of models taken in turns on the target's engine; a structure is exported once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cveff
from cveff.errors import CveffError, ExportError, TargetError
from cveff.export import timer as timer_module
from cveff.export.timer import EngineTimer, structure
from cveff.measure.latency import compare
from cveff.model import Model
from cveff.target import Target


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """The same network at two image sizes, the larger with twenty times the work."""
    return {
        "large": cveff.create("small_resnet_s", num_classes=3, image_size=64),
        "small": cveff.create("small_resnet_s", num_classes=3, image_size=16),
    }


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were written."""
    written = []
    real = timer_module.export

    def counted(model: Model, path: Path, check: bool) -> Path:
        written.append(path.name)
        return real(model, path, check=check)

    monkeypatch.setattr(timer_module, "export", counted)
    return written


@pytest.mark.parametrize("engine", [None, "openvino"])
def test_the_larger_model_is_slower_and_models_keep_their_mode(
    models: dict[str, Model], tiny_target: Target, engine: str | None
) -> None:
    if engine:
        pytest.importorskip(engine)
    models["large"].module.train()
    with EngineTimer(tiny_target, engine, seconds=0.2) as timer:
        assert (timer.engine, timer.threads, timer.batch) == (engine or "onnxruntime", 1, 1)
        found = timer.milliseconds(models)
    assert list(found) == ["large", "small"]
    assert found["large"] > 2 * found["small"] > 0
    assert models["large"].module.training


def test_a_file_that_is_there_is_not_exported_again(
    models: dict[str, Model], tiny_target: Target, exports: list[str], tmp_path: Path
) -> None:
    with EngineTimer(tiny_target, seconds=0.2) as timer:
        timer.use(models["small"], cveff.export(models["small"], tmp_path / "small.onnx"))
        assert timer.milliseconds({"small": models["small"]})["small"] > 0
    assert not exports and (tmp_path / "small.onnx").exists()


def test_a_structure_is_exported_once(
    models: dict[str, Model], tiny_target: Target, exports: list[str]
) -> None:
    model = models["small"]
    heavier = Model(model.spec, torch.nn.Sequential(*[model.module]))
    with EngineTimer(tiny_target, seconds=0.05) as timer:
        timer.milliseconds({"one": model})
        with torch.no_grad():
            model.module.fc.weight.mul_(2)  # other weights, the same time
        timer.milliseconds({"one": model, "again": model})
        assert len(exports) == 1
        timer.milliseconds({"other": heavier})
        assert len(exports) == 2
    wider = replace(model.spec, input=replace(model.spec.input, mean=(0.1, 0.2, 0.3)))
    assert structure(Model(wider, model.module)) != structure(model)


def test_times_come_from_interleaved_rounds(
    models: dict[str, Model], tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Mapping[str, object]] = {}

    def recorded(predictors, images, **settings):
        asked["predictors"] = predictors
        return compare(predictors, images, min_rounds=3, max_rounds=3, budget_seconds=0.01)

    monkeypatch.setattr(timer_module, "compare", recorded)
    with EngineTimer(tiny_target) as timer:
        result = timer.compare(models)
        assert list(asked["predictors"]) == ["large", "small"]  # one comparison of all
        assert all(len(latency.rounds_ms) == 3 for latency in result.values())
        times = timer.milliseconds(models)
    assert times.keys() == models.keys()
    assert all(0 < times[name] <= result[name].p90 * 10 for name in models)


def test_closing_removes_the_files(models: dict[str, Model], tiny_target: Target) -> None:
    timer = EngineTimer(tiny_target, seconds=0.05)
    timer.milliseconds({"small": models["small"]})
    assert timer._folder is not None
    folder = Path(timer._folder.name)
    assert len(list(folder.iterdir())) == 1
    timer.close()
    timer.close()
    assert not folder.exists()
    with pytest.raises(CveffError, match="was closed; make another"):
        timer.milliseconds(models)


def test_bad_requests_say_what_to_do(models: dict[str, Model], tiny_target: Target) -> None:
    with pytest.raises(TargetError, match="'tiny' has no fp32 candidate"):
        EngineTimer(replace(tiny_target, candidates=(("onnxruntime", "int8"),)))
    with pytest.raises(TargetError, match="engine 'abacus' is unknown; known: onnxruntime"):
        EngineTimer(tiny_target, "abacus")
    with EngineTimer(tiny_target) as timer:
        with pytest.raises(CveffError, match="nothing to time"):
            timer.milliseconds({})
        mislabelled = replace(models["small"].spec, labels=("a", "b"))
        with pytest.raises(ExportError, match=r"answers in shape \(1, 3\) for 1 images of 2 classes"):
            timer.milliseconds({"x": Model(mislabelled, models["small"].module)})


def test_no_model_is_changed_by_its_example(models: dict[str, Model], tiny_target: Target) -> None:
    before = {name: value.clone() for name, value in models["small"].module.state_dict().items()}
    with EngineTimer(tiny_target, seconds=0.05) as timer:
        timer.milliseconds({"small": models["small"]})
    after = models["small"].module.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
