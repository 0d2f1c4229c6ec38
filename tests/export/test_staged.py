"""Staged bundles end to end on digits: the cut graph, one branching file, deployment, cascades, verify, bench,
report."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import cveff
from cveff.cli import main
from cveff.data import Data
from cveff.dynamic import EarlyExit, Goal
from cveff.errors import BundleError, CheckpointError, CveffError, StepError, TargetError
from cveff.export.bench import bench
from cveff.export.cascade import cascade
from cveff.export.exits import export_branching, export_stages
from cveff.export.onnx import example_images
from cveff.export.verify import verify
from cveff.model import Model
from cveff.runtime.engines import open_file
from cveff.runtime.session import CARRIED
from cveff.target import Target
from cveff.train import Train

pytestmark = pytest.mark.usefixtures("quick_stages")

TARGET = Target(
    name="one", description="one thread", candidates=(("onnxruntime", "fp32"),), threads=1, batch_sizes=(1, 4)
)
ARCHITECTURES = (
    ("resnet10t", {"image_size": 32}),
    ("vit_tiny_patch16_224", {"image_size": (32, 48), "depth": 4, "embed_dim": 24, "num_heads": 2}),
)


@pytest.fixture(scope="module")
def model(digits: Data) -> Model:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = cveff.create("small_resnet_s", labels=digits.labels, image_size=8, channels=1)
    train = Train(epochs=2, batch_size=64, optimizer="adamw", learning_rate=3e-3, warmup_epochs=0)
    made = cveff.apply(
        made, EarlyExit(exits=("stages.0", "stages.1"), train=train), data=digits, device="cpu"
    )
    torch.set_num_threads(threads)
    return made


@pytest.fixture(scope="module")
def bundle(model: Model, digits: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("staged") / "exits.bundle"
    return cveff.deploy(model, data=digits, target=TARGET, out=out, exits=Goal(accuracy_drop=3.0)).path


def pixels(data: Data, bundle: Path) -> np.ndarray:
    with cveff.runtime.open(bundle) as engine:
        return np.concatenate([images for images, _ in data.evaluation.evaluation_batches(engine.spec)])


@pytest.mark.parametrize(("name", "arguments"), ARCHITECTURES)
def test_stages_are_the_network(name: str, arguments: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = cveff.apply(cveff.create(name, num_classes=5, **arguments), EarlyExit(train=None))
    paths = export_stages(made, tmp_path, whole="model.onnx")
    batch = example_images(5, made)
    sessions = [open_file("onnxruntime", path, threads=1) for path in paths]
    outputs = sessions[0].outputs(batch)
    found, carried = [outputs.pop("logits")], outputs
    for session in sessions[1:]:
        assert all(item.startswith(CARRIED) for item in session.carried)
        outputs = session.go_on(carried)
        found.append(outputs.pop("logits"))
        carried |= outputs
    with torch.no_grad():
        floats = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in (made.spec.input.mean, made.spec.input.std))
        expected = made.module.eval().answers((floats - mean) / std)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=1e-5)
    # The engine may fuse across what is a cut elsewhere, which rounds otherwise in the last bits.
    whole = open_file("onnxruntime", tmp_path / "model.onnx", threads=1)(batch)
    np.testing.assert_allclose(found[-1], whole, rtol=1e-4, atol=1e-6)
    # Survivors alone get what they would have got among the others.
    alone = {key: value[1:3] for key, value in sessions[0].outputs(batch).items() if key != "logits"}
    np.testing.assert_allclose(sessions[1].go_on(alone)["logits"], found[1][1:3], rtol=1e-5, atol=1e-6)
    with pytest.raises(CveffError, match="goes on from another stage and takes no images"):
        sessions[1](batch)
    # No weight is in two files; vectors may be, since fresh norms' are all alike and stored once.
    names = [item.name for path in paths for item in onnx.load(path).graph.initializer if len(item.dims) > 1]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("gate", ["confidence", "margin", "entropy"])
def test_one_file_with_branches_answers_as_the_stages(
    gate: str, model: Model, bundle: Path, digits: Data, tmp_path: Path
) -> None:
    images = pixels(digits, bundle)[:40]
    with cveff.runtime.open(bundle) as engine:
        assert engine.cascade is not None
        exits = engine.cascade.exits(images)
    from cveff.runtime.gates import certainty

    limit = float(np.median(certainty(exits[0], gate)))
    path = export_branching(model, tmp_path / "if.onnx", [limit, 0.0], gate=gate)
    assert sum(node.op_type == "If" for node in onnx.load(path).graph.node) == 1
    session = open_file("onnxruntime", path, threads=1)
    for index, image in enumerate(images):
        leaves = certainty(exits[0][index : index + 1], gate)[0]
        if abs(leaves - limit) > 1e-5:  # the file computes the certainty in float32
            expected = exits[0 if leaves >= limit else 1][index]
            np.testing.assert_allclose(session(image[None])[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(session(images), exits[1], rtol=1e-4, atol=1e-5)  # some image is not certain
    with pytest.raises(CveffError, match="a model with other exits"):
        export_branching(model, tmp_path / "if.onnx", [0.5])


def test_a_deployed_bundle_keeps_what_was_promised(bundle: Path, digits: Data) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    stages, metrics = manifest["stages"], manifest["metrics"]
    assert [entry["stage"] for entry in stages["files"]] == ["stages.0", "stages.1", "the end"]
    assert sum(stages["evaluation"]["exits"]) == metrics["images"]["count"] == len(digits.evaluation)
    assert sum(entry["exits"] for entry in stages["files"]) == stages["calibration"]["count"]
    images = pixels(digits, bundle)
    with cveff.runtime.open(bundle) as engine:
        assert engine.cascade is not None
        _, left = engine.staged(images)
        assert np.bincount(left, minlength=3).tolist() == stages["evaluation"]["exits"]
        found = engine.cascade.answer(images)[0].argmax(1)
        assert float((found == digits.evaluation.targets).mean()) == metrics["accuracy"]["deployed"]
        # -inf and inf: the first file's answers and the last's, bit for bit.
        first, *_, last = engine.cascade.exits(images)
        assert np.array_equal(engine.cascade.answer(images, [-np.inf, np.inf])[0], first)
        assert np.array_equal(engine.cascade.answer(images, [np.inf, np.inf])[0], last)
    whole = open_file("onnxruntime", bundle / "model.onnx", threads=1)
    np.testing.assert_allclose(last, whole(images), rtol=1e-3, atol=1e-5)
    memory = metrics["memory"]
    assert metrics["peak_rss_bytes"] == memory["peak_rss_bytes"] > memory["baseline_rss_bytes"] > 10_000_000
    curve = stages["curve"]
    assert all(a["accuracy"] < b["accuracy"] for a, b in itertools.pairwise(curve))
    page = (bundle / "report.html").read_text()
    # The images shown are those that left last and first.
    names = [entry["stage"] for entry in stages["files"]]
    reached = [name for name, count in zip(names, stages["evaluation"]["exits"], strict=True) if count]
    assert "Where images leave" in page and len(reached) > 1, stages["evaluation"]
    assert f"left at {reached[0]}" in page and f"left at {reached[-1]}" in page


def test_a_memory_limit_that_the_stages_do_not_meet(model: Model, digits: Data, tmp_path: Path) -> None:
    target = replace(TARGET, memory_mb=20)
    with pytest.raises(
        TargetError, match=r"3 stages, all of them open, need \d+ MiB of memory at batch 1; the target has 20"
    ):
        cveff.deploy(model, data=digits, target=target, out=tmp_path / "b", exits=Goal(accuracy_drop=3.0))
    assert not any(tmp_path.iterdir())


def test_openvino_runs_the_same_stages_at_any_batch(bundle: Path, digits: Data) -> None:
    pytest.importorskip("openvino")
    images = pixels(digits, bundle)[:21]
    with cveff.runtime.open(bundle) as own, cveff.runtime.open(bundle, engine="openvino") as other:
        assert own.cascade is not None and other.cascade is not None and other.name == "openvino"
        for batch in (images, images[:5], images[5:6]):
            for ours, theirs in zip(own.cascade.exits(batch), other.cascade.exits(batch), strict=True):
                np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4)


def test_verify_sees_that_stages_are_the_network_and_bench_times_real_images(
    bundle: Path, digits: Data
) -> None:
    # Thresholds were chosen on 144 images, which says little of points lost on others.
    found = verify(bundle, data=digits, threads=1, max_accuracy_drop=15)
    assert found.ok, found.problems
    assert found.claimed_accuracy == found.accuracy
    assert any("Images left at" in note for note in found.notes)
    with pytest.raises(CveffError, match="has stages, so its time depends on the images; give data"):
        bench(bundle, threads=1, rounds=1, memory=False)
    figures = bench([f"onnxruntime:{bundle / 'model.onnx'}", bundle], threads=1, rounds=1, data=digits)
    assert [item.kind for item in figures] == ["onnx", "bundle"]
    assert all((item.peak_rss_bytes or 0) > 20_000_000 for item in figures)
    assert figures[1].accuracy == found.accuracy and figures[1].median_ms > 0


def test_verify_says_when_a_stage_is_another_networks(bundle: Path, tmp_path: Path) -> None:
    import shutil

    from cveff.runtime.manifest import sha256

    damaged = shutil.copytree(bundle, tmp_path / "damaged.bundle")
    path = damaged / "stage3.onnx"
    proto = onnx.load(path)
    for item in proto.graph.initializer:
        if len(item.dims) == 4:
            item.raw_data = np.roll(onnx.numpy_helper.to_array(item), 1, axis=0).tobytes()
            break
    onnx.save(proto, path)
    manifest = json.loads((damaged / "manifest.json").read_text())
    listed = next(item for item in manifest["files"] if item["path"] == "stage3.onnx")
    listed.update(sha256=sha256(path), bytes=path.stat().st_size)
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    found = verify(damaged, threads=1)
    assert "the stages are another network" in found.problems[0]


def test_thresholds_are_chosen_anew_for_a_staged_bundle(bundle: Path, digits: Data, tmp_path: Path) -> None:
    made = cascade(
        bundle,
        data=digits,
        out=tmp_path / "again.bundle",
        exits=Goal(accuracy_drop=100),
        gate="margin",
        threads=1,
    )
    stages = made.manifest["stages"]
    assert stages["gate"] == "margin" and stages["files"][0]["threshold"] == 0.0
    assert stages["evaluation"]["exits"] == [len(digits.evaluation), 0, 0]
    with pytest.raises(StepError, match="Best reachable: the fastest"):
        cascade(bundle, data=digits, out=tmp_path / "no.bundle", exits=Goal(mean_latency=1e-6), threads=1)
    assert not (tmp_path / "no.bundle").exists()


def test_the_verb_composes_and_says_what_it_made(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cascade", str(bundle), "--data", "digits", "--threads", "1", "--accuracy-drop", "100"]
    assert main([*words, "--out", str(tmp_path / "a.bundle"), "--json", "--quiet"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["manifest"]["stages"]["goal"] == {"mean_latency": None, "accuracy_drop": 100.0}
    assert main([*words, "--out", str(tmp_path / "b.bundle"), "--quiet"]) == 0
    assert "images that leave" in " ".join(capsys.readouterr().out.split())
    assert main([*words, "--out", str(tmp_path / "c.bundle"), "--quiet", "--gate", "luck"]) == 2
    assert "gate 'luck' is unknown" in capsys.readouterr().err


def test_bundles_of_other_sizes_compose(
    bundle: Path, quick_timing: object, digits: Data, tmp_path: Path, digits_model: Model
) -> None:
    torch.manual_seed(1)
    larger = cveff.create("small_resnet_s", labels=digits.labels, image_size=12, channels=1)
    larger.module.load_state_dict(digits_model.module.state_dict())
    larger = replace(larger, spec=replace(larger.spec, input=replace(larger.spec.input, enlarge=True)))
    large = cveff.deploy(
        larger, data=digits, target=TARGET, out=tmp_path / "large.bundle", max_accuracy_drop=100
    ).path
    made = cascade(
        [bundle, large], data=digits, out=tmp_path / "both.bundle", exits=Goal(accuracy_drop=50), threads=1
    )
    files = made.manifest["stages"]["files"]
    assert [entry["size"] for entry in files] == [[8, 8]] * 3 + [[12, 12]]
    assert [entry["goes_on"] for entry in files] == [False, True, True, False]
    with cveff.runtime.open(made.path) as engine, cveff.runtime.open(large) as alone:
        assert engine.cascade is not None and engine.spec.size == (12, 12)
        images = pixels(digits, large)[:9]
        last, _ = engine.cascade.answer(images, [np.inf] * 3)
        assert np.array_equal(last, alone.logits(images))
    assert verify(made.path, data=digits, threads=1, max_accuracy_drop=100).ok
    with pytest.raises(BundleError, match="put the one with the largest last"):
        cascade([large, bundle], data=digits, out=tmp_path / "no.bundle")


def test_what_does_not_fit_is_refused_before_any_work(
    bundle: Path, tiny_bundle: Path, digits: Data, tmp_path: Path, digits_model: Model
) -> None:
    with pytest.raises(BundleError, match="stages must have the same labels"):
        cascade([tiny_bundle, bundle], data=digits, out=tmp_path / "no.bundle")
    with pytest.raises(BundleError, match="needs two bundles or more"):
        cascade(tiny_bundle, data=digits, out=tmp_path / "no.bundle")
    with pytest.raises(CveffError, match="gate 'luck' is unknown"):
        cascade(bundle, data=digits, out=tmp_path / "no.bundle", gate="luck", threads=1)
    with pytest.raises(StepError, match="this one has none; apply EarlyExit or GlanceFocus first"):
        cveff.deploy(digits_model, data=digits, target=TARGET, out=tmp_path / "no.bundle", exits=Goal())
    with pytest.raises(CheckpointError, match="has no early exits"):
        export_stages(digits_model, tmp_path)
