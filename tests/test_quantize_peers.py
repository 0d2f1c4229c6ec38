"""The benchmark of int8 against other tools: same images for all, bars that can fail, emulation that goes on."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import cveff
from cveff.backbones.reparameterize import has_branches
from cveff.compress.samples import samples
from cveff.measure import top1

FOLDER = Path(__file__).parents[1] / "tools" / "benchmarks"


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, imported as if it ran."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import quantize_peers

    yield quantize_peers
    for name in set(sys.modules) - before:
        where = getattr(sys.modules[name], "__file__", None)
        if where is not None and Path(where).parent == FOLDER:
            sys.modules.pop(name)


@pytest.fixture
def row(subject: ModuleType, tmp_path: Path) -> Any:
    """A small network on the embedded digits, barely trained, as a row of the benchmark."""
    data = cveff.data.load("digits", seed=0)
    torch.manual_seed(0)
    model = cveff.create("small_resnet_s", labels=data.labels, image_size=8, channels=1)
    from cveff.train import Train

    model = cveff.apply(model, Train(epochs=2, batch_size=64, warmup_epochs=0.0), data=data, seed=0)
    source = subject.peers.plain_export(model.module, model.spec.input, tmp_path / "fp32.onnx")
    job = subject.Job(model, data, source, 24, 3, Path(sys.executable))
    return subject.Row("digits-3", "digits", 3, model, data, tmp_path, job, {"files": {}})


def test_peers_calibrate_on_the_images_that_ours_sees(row: Any) -> None:
    ours = torch.cat([images for images, _ in samples(row.data.train, row.model.spec.input, 24, seed=3)])
    assert row.job.calibration.shape == (24, 1, 8, 8)
    np.testing.assert_allclose(row.job.calibration, ours.numpy(), atol=1e-6)


def test_files_are_judged_alike_and_a_tool_that_fails_is_a_result(
    subject: ModuleType, row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: Any, path: Path) -> None:
        raise ValueError("no such operator")

    names = (subject.OURS_FILES[0], subject.ONNXRUNTIME_CPU)
    tools = {name: subject.TOOLS[name] for name in names} | {"broken": broken}
    monkeypatch.setattr(subject, "TOOLS", tools)
    monkeypatch.setattr("quantize_tools.TOOLS", tools)
    saved = SimpleNamespace(save=lambda: None)
    subject.accuracy(row, saved, Namespace(threads=1))
    files = row.values["files"]
    assert files["broken"] == {"error": "ValueError: no such operator"}
    targets = row.data.evaluation.targets
    assert row.values["fp32"]["accuracy"] == top1(row.reference(1), targets) > 0.5
    for name in names:
        found = files[name]
        assert found["images"] == len(targets) and found["cosine"] > 0.95 < found["as_written_cosine"]
        lost = 100 * (row.values["fp32"]["accuracy"] - found["accuracy"])
        assert found["points_lost"] == pytest.approx(lost) and abs(lost) < 10
    # What is there stays; what failed is tried again.
    before = files[names[0]]
    monkeypatch.setitem(tools, "broken", tools[names[1]])
    subject.accuracy(row, saved, Namespace(threads=1))
    assert files[names[0]] is before and files["broken"]["cosine"] == files[names[1]]["cosine"]


def test_small_repvgg_merges_and_comes_back_from_its_folder(tmp_path: Path, subject: ModuleType) -> None:
    model = cveff.create("repvgg_small_64", num_classes=10, image_size=64, channels=1)
    assert has_branches(model.module)
    merged = cveff.apply(model, subject.quantize_networks.Reparameterize())
    assert not has_branches(merged.module)
    cveff.save(merged, tmp_path / "saved")
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(cveff.load(tmp_path / "saved").module.eval()(x), merged.module.eval()(x))


def test_crops_to_judge_on_are_of_other_photographs(subject: ModuleType) -> None:
    spec = cveff.create("small_resnet_s", num_classes=2, image_size=16).spec
    amount = subject.Amount(calibration=5, crops=7)
    data = subject.quantize_networks.crops(SimpleNamespace(spec=spec), 0, amount, None)
    assert data.train is not None and (len(data.train), len(data.evaluation)) == (5, 7)
    assert data.evaluation.targets is None


def test_emulated_processor_computes_the_file_and_goes_on(
    subject: ModuleType, row: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated = subject.emulated
    if emulated.missing():
        with pytest.raises(cveff.CveffError, match="apt-get"):
            emulated.emulated_logits(row.job.source, np.zeros((1, 1, 8, 8), np.float32), tmp_path)
        pytest.skip(emulated.missing())
    monkeypatch.setattr(emulated, "CHUNK", 2)
    inputs = subject.peers.normalised(row.images()[:3], row.model.spec.input)
    expected = row.reference(1)[:3]
    found = emulated.emulated_logits(row.job.source, inputs, tmp_path / "kept")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    # A chunk that is there is not computed again.
    (kept,) = (tmp_path / "kept").iterdir()
    np.save(kept / "0.npy", np.full_like(found[:2], 7))
    again = emulated.emulated_logits(row.job.source, inputs, tmp_path / "kept")
    assert (again[:2] == 7).all() and np.array_equal(again[2], found[2])


def _file(score: float, images: int = 100, **others: float) -> dict[str, Any]:
    return {"agreement": score, "cosine": 0.99, "images": images, "bytes": 1, **others}


def _labelled(accuracy: float, of: float = 0.95) -> dict[str, Any]:
    return _file(0.9, accuracy=accuracy, points_lost=100 * (of - accuracy))


def test_ours_is_best_or_within_a_tenth_of_a_point(subject: ModuleType) -> None:
    from quantize_tools import OURS, RIVALS

    others: tuple[str, ...] = ()

    def verdict(ours: float, *peers: float) -> dict[str, Any]:
        files = {OURS: _labelled(ours)} | dict(zip(RIVALS, map(_labelled, peers), strict=False))
        return subject.summary({"rows": {f"{name}-0": {"files": files} for name in ("vit", *others)}})

    good = verdict(0.949, 0.90, 0.95, 0.94, 0.93)
    assert good["networks"]["vit"]["passes"] is True and good["networks"]["vit"]["best_rival"] == RIVALS[1]
    assert good["vit_passes"] is True and good["mean_passes"] is None and good["repvgg_passes"] is None
    assert verdict(0.9489, 0.90, 0.9502, 0.94, 0.93)["networks"]["vit"]["passes"] is False
    assert verdict(0.944, 0.9, 0.9, 0.9, 0.9)["vit_passes"] is False
    assert verdict(0.949, 0.90, 0.90)["networks"]["vit"]["passes"] is None  # not everyone was measured
    others = ("mobile", "repvgg", "convnext")
    assert verdict(0.947, 0.9, 0.9, 0.9, 0.9)["mean_passes"] is True
    assert verdict(0.946, 0.9, 0.9, 0.9, 0.9)["mean_passes"] is False
    assert subject.summary({})["mean_passes"] is None


def test_a_verdict_waits_until_every_tool_has_seen_every_image(subject: ModuleType) -> None:
    from quantize_tools import OURS, RIVALS

    whole = {OURS: _file(0.9), **{tool: _file(0.8) for tool in RIVALS}}
    half = {OURS: _file(0.9)}

    def passes(*rows: dict[str, Any]) -> object:
        found = subject.summary({"rows": {f"lite0-{i}": {"files": row} for i, row in enumerate(rows)}})
        return found["networks"]["lite0"]["passes"]

    assert passes(whole, whole) is True
    assert passes(whole, half) is None


def test_a_peer_that_failed_neither_wins_nor_hides_the_others(subject: ModuleType) -> None:
    from quantize_tools import OURS, RIVALS

    failed: dict[str, Any] = {tool: {"error": "broken"} for tool in RIVALS}
    files = {OURS: _file(0.9), **failed, RIVALS[0]: _file(0.95)}
    found = subject.summary({"rows": {"lite0-0": {"files": files}}})["networks"]["lite0"]
    assert found["score"] == "agreement" and found["best_rival"] == RIVALS[0]
    assert found["points_behind"] == pytest.approx(5) and found["passes"] is False
    files[OURS] = {"error": "broken"}
    assert subject.summary({"rows": {"lite0-0": {"files": files}}})["networks"]["lite0"]["passes"] is False


def test_emulated_bar_needs_a_thousand_crops_of_all_splits(subject: ModuleType) -> None:
    from quantize_tools import OURS, OURS_NARROW

    def verdict(agreement: float, images: int) -> dict[str, Any]:
        part = {
            "files": {OURS: _file(1)},
            "emulated": {"files": {OURS_NARROW: _file(agreement, images, cosine=0.985)}},
        }
        return subject.summary({"rows": {"lite0-0": part, "lite0-1": part}})["emulated"]

    assert verdict(0.85, 500)["passes"] is True
    assert verdict(0.849, 500)["passes"] is False
    assert verdict(0.9, 499)["passes"] is False
    without = {"files": {OURS: _file(1)}, "emulated": {"not measured": "no emulator"}}
    found = subject.summary({"rows": {"lite0-0": without}})["emulated"]
    assert found == {"passes": None, "not measured": "no emulator"}


def test_aware_bar_is_of_loss_and_of_equal_answers(subject: ModuleType) -> None:
    from quantize_tools import OURS

    def passes(lost: float, same: float) -> bool:
        aware = {"quantization-aware": {"points_lost": lost, "same_top1": same}}
        rows = {"repvgg-0": {"files": {OURS: _labelled(0.95)}, "aware": aware}}
        return subject.summary({"rows": rows})["aware"]["passes"]

    assert passes(0.3, 0.999)
    assert not passes(0.31, 1.0) and not passes(0.0, 0.9989)
