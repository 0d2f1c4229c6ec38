"""Bench: whatever can be opened is measured; what cannot be opened is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cveff
from cveff.data import Data
from cveff.errors import BundleError, CveffError, DataError, EngineError
from cveff.export.bench import bench
from cveff.export.deploy import Deployment
from cveff.export.subjects import open_subject
from cveff.measure.accuracy import top1
from cveff.model import Model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, digits_model: Model) -> Path:
    path = tmp_path_factory.mktemp("saved") / "digits"
    cveff.save(digits_model, path)
    return path


def test_every_kind_of_subject_gets_its_figures(
    deployment: Deployment, digits_model: Model, digits: Data, saved: Path
) -> None:
    onnx = deployment.path / "model.onnx"
    figures = bench(
        [
            digits_model,
            (digits_model.module, digits_model.spec.input),
            saved,
            onnx,
            f"openvino:{onnx}",
            deployment.path,
        ],
        batch=(1, 3),
        threads=1,
        rounds=2,
        data=digits,
    )
    assert [entry.batch for entry in figures] == [1] * 6 + [3] * 6
    first = figures[:6]
    assert [entry.kind for entry in first] == ["module", "module", "module", "onnx", "onnx", "bundle"]
    assert [entry.engine for entry in first[:5]] == ["torch"] * 3 + ["onnxruntime", "openvino"]
    assert len({entry.name for entry in first}) == 6
    assert len({entry.accuracy for entry in first[:3]}) == 1
    assert first[5].accuracy == deployment.manifest["metrics"]["accuracy"]["deployed"]
    assert first[0].num_images == len(digits.evaluation)
    assert all(entry.peak_rss_bytes is None for entry in first[:3])
    assert all((entry.peak_rss_bytes or 0) > 10_000_000 for entry in first[3:])
    assert first[3].size_bytes == onnx.stat().st_size
    for entry in figures:
        assert entry.median_ms > 0 and entry.threads == 1 and entry.rounds == 2
        assert entry.throughput == pytest.approx(1000 * entry.batch / entry.median_ms)
        assert json.loads(json.dumps(entry.to_json())) == entry.to_json()
    assert figures[0].speedup == figures[6].speedup == 1.0


def test_subjects_of_different_sizes_and_given_names(onnx_maker: Callable[..., Path], tmp_path: Path) -> None:
    small = onnx_maker(tmp_path / "small.onnx", size=(8, 8))
    large = onnx_maker(tmp_path / "large.onnx", size=(64, 64), channels=1)
    figures = bench({"one": small, "two": large, "three": small}, threads=1, rounds=1, memory=False)
    assert [entry.name for entry in figures] == ["one", "two", "three"]
    twice = bench([small, small], threads=1, rounds=1, memory=False)
    assert [entry.name for entry in twice] == ["small.onnx", "small.onnx #2"]


def test_a_saved_model_answers_as_the_model(saved: Path, digits_model: Model, digits: Data) -> None:
    images = next(digits.val.evaluation_batches(digits_model.spec.input, 16))[0]
    first, second = open_subject(saved, threads=1), open_subject(digits_model, threads=1)
    assert (first.predictor(images) == second.predictor(images)).all()
    assert first.labels == digits_model.spec.labels and first.spec == digits_model.spec.input


def test_an_ir_knows_its_input(deployment: Deployment, tmp_path: Path) -> None:
    from cveff.export.openvino import convert

    path = convert(deployment.path / "model.onnx", tmp_path / "model.xml")
    subject = open_subject(path, threads=1)
    assert (subject.kind, subject.engine) == ("openvino", "openvino")
    assert subject.input.to_json() == deployment.manifest["input"]
    assert subject.labels == tuple(deployment.manifest["labels"])


def test_accuracy_needs_a_file_that_says_what_it_takes(
    onnx_maker: Callable[..., Path], tmp_path: Path, digits: Data
) -> None:
    foreign = onnx_maker(tmp_path / "foreign.onnx")
    with pytest.raises(CveffError, match="does not say which images it takes"):
        bench(foreign, data=digits, threads=1, rounds=1)


def test_data_of_other_classes_is_refused(digits_model: Model, digits: Data) -> None:
    from dataclasses import replace

    with pytest.raises(DataError, match="10 classes but digits has 3"):
        bench(digits_model, data=replace(digits, labels=("a", "b", "c")), threads=1, rounds=1)


def test_a_tampered_bundle_is_not_measured(deployment: Deployment, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(deployment.path, tmp_path / "copy"))
    file = copy / deployment.manifest["engine"]["file"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        bench(copy)


def test_what_cannot_be_opened_is_named(tmp_path: Path, saved: Path, deployment: Deployment) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    (tmp_path / "empty").mkdir()
    for subject, error, message in [
        (tmp_path / "nosuch.onnx", CveffError, "does not exist"),
        (tmp_path / "notes.txt", CveffError, "no saved model"),
        (tmp_path / "empty", CveffError, "no saved model"),
        (tmp_path / "broken.onnx", EngineError, "cannot open"),
        (torch.nn.Identity(), CveffError, "give \\(module, cveff.InputSpec"),
        (f"openvino:{saved}", CveffError, "export it first"),
    ]:
        with pytest.raises(error, match=message):
            open_subject(subject, threads=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"batch": ()}, "batch is"),
        ({"rounds": 0}, "rounds is 0"),
        ({"threads": 0}, "threads"),
    ],
)
def test_settings_out_of_range(digits_model: Model, settings: dict[str, object], message: str) -> None:
    with pytest.raises(CveffError, match=message):
        bench(digits_model, **settings)  # type: ignore[arg-type]


def test_nothing_to_measure() -> None:
    with pytest.raises(CveffError, match="nothing to measure"):
        bench([])


def test_top1_is_what_bench_reports(digits_model: Model, digits: Data) -> None:
    (figures,) = bench(digits_model, data=digits, threads=1, rounds=1)
    split = digits.evaluation
    predictor = open_subject(digits_model, threads=1).predictor
    assert split.targets is not None
    logits = torch.cat(
        [torch.from_numpy(predictor(x)) for x, _ in split.evaluation_batches(digits_model.spec.input)]
    )
    assert figures.accuracy == top1(logits.numpy(), split.targets)
