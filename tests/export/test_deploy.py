"""Deploy: what it ships is what it measured, and what it must refuse it refuses before any work."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cveff
from cveff.data import Data, MemorySplit
from cveff.errors import CveffError, DataError, InputSizeError, StepError, TargetError
from cveff.export import build_candidates, deploy_checks
from cveff.export.deploy import Deployment, deploy
from cveff.export.scoring import SCORING_BATCH
from cveff.measure.accuracy import agreement, predict, top1
from cveff.measure.parity import relative_difference
from cveff.measure.predictor import torch_predictor
from cveff.model import Model
from cveff.target import Target


class Nothing:
    """A progress that counts the work begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def track(self, items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        self.begun.append(description)
        yield from items

    def message(self, text: str) -> None:
        self.begun.append(text)


@pytest.fixture
def folder_of_images(tmp_path: Path, digits: Data) -> Path:
    """Forty digits as PNG files without labels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    assert digits.train is not None
    for index in range(40):
        digits.train.image(index).save(folder / f"{index:02}.png")
    return folder


def test_figures_measured_again_are_the_manifest_s(
    deployment: Deployment, digits_model: Model, digits: Data
) -> None:
    metrics = deployment.manifest["metrics"]
    spec = digits_model.spec.input
    with cveff.runtime.open(deployment.path) as engine:
        batches = digits.evaluation.evaluation_batches(spec, SCORING_BATCH)
        logits, targets = predict(engine.logits, batches)
    original, _ = predict(
        torch_predictor(digits_model, 1), digits.evaluation.evaluation_batches(spec, SCORING_BATCH)
    )
    assert targets is not None
    assert metrics["accuracy"] == {"reference": top1(original, targets), "deployed": top1(logits, targets)}
    assert metrics["agreement"] == agreement(logits, original)
    assert metrics["parity"]["max_relative_difference"] == pytest.approx(
        relative_difference(logits, original), rel=1e-4
    )
    assert metrics["images"] == {"split": digits.evaluation.name, "count": len(digits.evaluation)}


def test_one_is_chosen_among_all_candidates(deployment: Deployment, tiny_target: Target) -> None:
    candidates = deployment.manifest["candidates"]
    assert [(entry["engine"], entry["precision"]) for entry in candidates] == list(tiny_target.candidates)
    assert sum(entry["chosen"] for entry in candidates) == 1
    assert all(entry["why"] for entry in candidates)
    assert deployment.chosen["engine"] == deployment.manifest["engine"]["name"]
    assert deployment.manifest["metrics"]["latency_ms"]["median"] == deployment.chosen["latency_ms"]
    assert [item["batch"] for item in deployment.manifest["metrics"]["latencies"]] == [1, 4]
    assert deployment.manifest["metrics"]["peak_rss_bytes"] > 10_000_000
    int8 = next(
        entry for entry in candidates if (entry["engine"], entry["precision"]) == ("onnxruntime", "int8")
    )
    assert 0 <= int8["meaning_gap"]["agreement"] <= 1


def test_every_engine_of_the_bundle_runs_the_same_network(deployment: Deployment, digits: Data) -> None:
    images = next(digits.val.evaluation_batches(cveff.runtime.open(deployment.path).spec, 32))[0]
    answers = {}
    for name in ("onnxruntime:fp32", "openvino:fp32"):
        with cveff.runtime.open(deployment.path, engine=name) as engine:
            answers[name] = engine.logits(images)
    assert relative_difference(*answers.values()) < 1e-4


def test_float32_on_onnx_runtime_always_ships() -> None:
    from cveff.export.candidates import Candidate
    from cveff.export.deploy_manifest import _alternatives

    int8 = Candidate("openvino", "int8", file="model.int8.xml", chosen=True)
    (entry,) = _alternatives([int8], threads=3)
    assert entry["name"] == "onnxruntime" and entry["file"] == "model.onnx" and entry["threads"] == 3
    fp32 = [
        Candidate("onnxruntime", "fp32", chosen=True),
        Candidate("openvino", "fp32", error="not installed"),
    ]
    assert _alternatives([*fp32, int8], threads=1) == []


def test_the_model_is_left_as_it_was(digits_model: Model) -> None:
    assert digits_model.spec.edits == ()
    assert digits_model.spec.labels == tuple(str(digit) for digit in range(10))


def test_branches_are_merged_and_recorded(tmp_path: Path, digits: Data, quick_timing: object) -> None:
    labels, target = digits.labels, Target("one", "", (("onnxruntime", "fp32"),), threads=1, batch_sizes=(1,))
    model = cveff.create("repvgg_a0", labels=labels, image_size=32, channels=1)
    model.module.eval()
    model = Model(replace(model.spec, input=replace(model.spec.input, enlarge=True)), model.module)
    few = replace(digits, val=digits.val.subset(range(24)), test=None)
    before = len(list(model.module.modules()))
    made = deploy(model, data=few, target=target, out=tmp_path / "b")
    assert made.manifest["model"]["edits"] == [{"kind": "reparameterize"}]
    assert made.manifest["model"]["parameters"] < model.num_parameters
    assert len(list(model.module.modules())) == before
    assert made.manifest["metrics"]["agreement"] == 1.0


def test_without_labels_agreement_on_held_out_images_decides(
    tmp_path: Path, digits_model: Model, folder_of_images: Path, quick_timing: object, tiny_target: Target
) -> None:
    target = replace(tiny_target, candidates=tiny_target.candidates[:2])
    made = deploy(
        digits_model, calibration=folder_of_images, target=target, max_accuracy_drop=20, out=tmp_path / "b"
    )
    metrics = made.manifest["metrics"]
    assert metrics["accuracy"] == {"reference": None, "deployed": None}
    assert metrics["images"] == {"split": "held-out", "count": 20}
    assert 0.8 <= metrics["agreement"] <= 1
    assert "agrees with the original" in made.chosen["why"]
    assert "Only 20 images were measured" in (made.path / "report.html").read_text(encoding="utf-8")


def test_a_calibration_folder_stands_in_for_training_images(
    digits_model: Model, digits: Data, folder_of_images: Path, tiny_target: Target
) -> None:
    images = deploy_checks.gather_images(
        digits_model, replace(digits, train=None), folder_of_images, tiny_target,
        num_calibration=500, seed=0, on_bad_image="error", progress=Nothing(),
    )  # fmt: skip
    assert images.calibration is not None and images.calibration.shape == (40, 8, 8, 1)
    assert images.selection is digits.val and images.evaluation is digits.evaluation and images.is_labelled
    expected = np.stack([digits.train.source(i) for i in range(40)])  # type: ignore[union-attr, arg-type]
    assert sorted(map(bytes, images.calibration)) == sorted(map(bytes, expected))


def test_without_int8_no_image_calibrates(digits_model: Model, digits: Data) -> None:
    target = Target("floats", "", (("onnxruntime", "fp32"),))
    images = deploy_checks.gather_images(
        digits_model, replace(digits, train=None), None, target,
        num_calibration=8, seed=0, on_bad_image="error", progress=Nothing(),
    )  # fmt: skip
    assert images.calibration is None


def test_the_two_halves_share_no_image(digits: Data) -> None:
    assert digits.train is not None
    calibration, held_out = deploy_checks.halves(digits.train.subset(range(41)), 3, needs_calibration=True)
    assert calibration is not None and (len(calibration), len(held_out)) == (20, 21)
    everything = np.concatenate(
        [[split.source(i) for i in range(len(split))] for split in (calibration, held_out)]
    )
    expected = np.stack([digits.train.source(i) for i in range(41)])  # type: ignore[arg-type]
    assert sorted(map(bytes, everything)) == sorted(map(bytes, expected))


def test_a_missing_engine_and_a_failing_build_do_not_stop_the_run(
    tmp_path: Path, digits_model: Model, digits: Data, quick_timing: object, tiny_target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fails(*_: object, **__: object) -> Path:
        raise cveff.errors.ExportError("the quantizer tripped")

    monkeypatch.setattr(build_candidates, "available_engines", lambda: ("onnxruntime",))
    monkeypatch.setattr("cveff.export.int8.Int8.onnx", fails)
    made = deploy(digits_model, data=digits, target=tiny_target, out=tmp_path / "b", num_calibration=8)
    assert made.chosen["engine"] == "onnxruntime" and made.chosen["precision"] == "fp32"
    why = {(entry["engine"], entry["precision"]): entry["why"] for entry in made.manifest["candidates"]}
    assert why["openvino", "int8"] == "openvino is not installed; pip install 'cveff[openvino]'"
    assert "the quantizer tripped" in why["onnxruntime", "int8"]
    assert [entry["name"] for entry in made.manifest["alternatives"]] == []


def test_a_mixture_ships_where_it_is_the_fastest(
    tmp_path: Path, digits_model: Model, digits: Data, quick_timing: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device where the first layer is slow in integers, and little is gained by the others."""

    def milliseconds(_: object, models: Mapping[str, Model]) -> dict[str, float]:
        times = {}
        for name, model in models.items():
            edits = [edit for edit in model.spec.edits if edit.kind == "quantize"]
            layers = [site.reader for edit in edits for site in edit.placement.weights]
            times[name] = 20.0 + sum(4.0 if layer.startswith("stem") else -1.0 for layer in layers)
        return times

    monkeypatch.setattr("cveff.export.timer.EngineTimer.milliseconds", milliseconds)
    pairs = (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("onnxruntime", "int8-mixed"))
    target = Target("mixed", "", pairs, threads=1, batch_sizes=(1,))
    made = deploy(
        digits_model, data=digits, target=target, out=tmp_path / "b", num_calibration=64, max_accuracy_drop=5
    )
    mixed = made.manifest["candidates"][2]
    assert mixed["latency_ms"] is not None, mixed["why"]
    in_floats = [layer for layer in mixed["rounding"]["layers"] if layer["precision"] == "fp32"]
    assert [layer["name"].partition(".")[0] for layer in in_floats] == ["stem"]
    assert "faster in floats" in in_floats[0]["why"]
    assert mixed["meaning_gap"]["agreement"] > 0.9
    page = (made.path / "report.html").read_text(encoding="utf-8")
    assert "What was rounded" in page and "ONNX Runtime int8-mixed" in page


def test_no_mixture_is_made_where_integers_are_fast_enough(
    tmp_path: Path, digits_model: Model, digits: Data, quick_timing: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cveff.export.timer.EngineTimer.milliseconds", lambda _, models: {"fp32": 2.0, "int8": 1.0}
    )
    pairs = (("onnxruntime", "fp32"), ("onnxruntime", "int8-mixed"))
    target = Target("mixed", "", pairs, threads=1, batch_sizes=(1,))
    made = deploy(digits_model, data=digits, target=target, out=tmp_path / "b", num_calibration=64)
    assert made.manifest["candidates"][1]["why"] == (
        "not built: 8 bits throughout take 50% of floats' time and keep to the limit"
    )


def test_nothing_is_written_when_no_candidate_is_left(
    tmp_path: Path, digits_model: Model, digits: Data, quick_timing: object
) -> None:
    target = Target("phone", "", (("onnxruntime-qnn", "fp32"),), threads=1, batch_sizes=(1,))
    with pytest.raises(TargetError, match="onnxruntime-qnn"):
        deploy(digits_model, data=digits, target=target, out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_memory_limit_that_nothing_meets(
    tmp_path: Path, digits_model: Model, digits: Data, quick_timing: object
) -> None:
    target = Target("small", "", (("onnxruntime", "fp32"),), threads=1, batch_sizes=(1,), memory_mb=1)
    with pytest.raises(TargetError, match="MiB of memory, the target has 1"):
        deploy(digits_model, data=digits, target=target, out=tmp_path / "b")


def test_interrupted_half_way_leaves_nothing(
    tmp_path: Path, digits_model: Model, digits: Data, monkeypatch: pytest.MonkeyPatch, tiny_target: Target
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cveff.export.measure_candidates.score", interrupted)
    target = replace(tiny_target, candidates=tiny_target.candidates[:1])
    with pytest.raises(KeyboardInterrupt):
        deploy(digits_model, data=digits, target=target, out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, StepError, "needs data"),
        ({"data": "digits", "max_accuracy_drop": -1}, StepError, "max_accuracy_drop is -1"),
        ({"data": "digits", "num_calibration": 0}, StepError, "num_calibration is 0"),
        ({"data": "digits", "target": "nosuch"}, TargetError, "edge-cpu"),
        ({"data": "nosuch"}, DataError, "nosuch"),
        ({"calibration": "nosuch"}, DataError, "nosuch"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    tmp_path: Path, digits_model: Model, settings: dict[str, Any], error: type[CveffError], message: str
) -> None:
    progress = Nothing()
    with pytest.raises(error, match=message):
        deploy(digits_model, out=tmp_path / "b", progress=progress, **settings)
    assert not [line for line in progress.begun if "export" in line]
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_or_foreign_folder_is_not_replaced(
    tmp_path: Path, digits_model: Model, deployment: Deployment
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    with pytest.raises(CveffError, match="existing file"):
        deploy(digits_model, data="digits", out=tmp_path / "file")
    with pytest.raises(CveffError, match="something else than a bundle"):
        deploy(digits_model, data="digits", out=tmp_path / "folder")
    with pytest.raises(CveffError, match="cannot write"):
        deploy(digits_model, data="digits", out="/proc/nosuch/b")
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert deploy_checks.check_out(deployment.path) == deployment.path


def renamed(data: Data, labels: tuple[str, ...]) -> Data:
    return replace(data, labels=labels)


def test_labels_must_fit(digits_model: Model, digits: Data) -> None:
    names = tuple(f"digit {index}" for index in range(10))
    assert deploy_checks.check_labels(digits_model, renamed(digits, names)) == (names, [])
    named = Model(replace(digits_model.spec, labels=names), digits_model.module)
    assert deploy_checks.check_labels(named, renamed(digits, names)) == (names, [])
    with pytest.raises(DataError, match="10 classes but digits has 3"):
        deploy_checks.check_labels(named, renamed(digits, names[:3]))
    with pytest.raises(DataError, match="another order: class 0 is 'digit 0' for the model and 'digit 9'"):
        deploy_checks.check_labels(named, renamed(digits, names[::-1]))
    _, warnings = deploy_checks.check_labels(named, digits)
    assert "names its classes otherwise" in warnings[0]


def test_images_smaller_than_the_model_are_refused_first(tmp_path: Path, digits: Data) -> None:
    model = cveff.create("small_resnet_s", labels=digits.labels, image_size=28, channels=1)
    progress = Nothing()
    with pytest.raises(InputSizeError, match="8×8 is smaller"):
        deploy(model, data=digits, out=tmp_path / "b", progress=progress)
    assert progress.begun == []


def test_data_without_training_images_needs_a_calibration_folder(
    tmp_path: Path, digits_model: Model, digits: Data
) -> None:
    with pytest.raises(DataError, match="no training images to calibrate int8"):
        deploy(digits_model, data=replace(digits, train=None), out=tmp_path / "b")


def test_unlabelled_and_empty_splits_are_refused(tmp_path: Path, digits_model: Model, digits: Data) -> None:
    images = np.zeros((4, 8, 8, 1), np.uint8)
    with pytest.raises(DataError, match="no labelled images"):
        deploy(digits_model, data=replace(digits, val=MemorySplit("val", images, None)), out=tmp_path / "b")


def test_one_calibration_image_cannot_be_halved(tmp_path: Path, digits_model: Model) -> None:
    (tmp_path / "one").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "one" / "a.png")
    with pytest.raises(DataError, match="at least 2"):
        deploy(digits_model, calibration=tmp_path / "one", out=tmp_path / "b")


def test_a_saved_folder_deploys_like_the_model_and_replaces_an_older_bundle(
    tmp_path: Path, digits_model: Model, digits: Data, quick_timing: object
) -> None:
    target = Target("one", "", (("onnxruntime", "fp32"),), threads=1, batch_sizes=(2,))
    cveff.save(digits_model, tmp_path / "saved")
    few = replace(digits, val=digits.val.subset(range(64)), test=None)
    recipe = {"seed": 7, "note": "kept as it is"}
    first = deploy(digits_model, data=few, target=target, out=tmp_path / "b")
    second = deploy(
        tmp_path / "saved", data=few, target=target, out=tmp_path / "b", recipe=recipe, name="mine"
    )
    assert first.manifest["metrics"]["accuracy"] == second.manifest["metrics"]["accuracy"]
    assert first.manifest["recipe"]["deploy"]["target"] == "one"
    assert second.manifest["recipe"] == recipe and second.manifest["model"]["name"] == "mine"
    assert json.loads((tmp_path / "b" / "manifest.json").read_text()) == second.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "saved"]
