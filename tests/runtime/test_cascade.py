"""Staged bundles without torch: gates, compaction, sizes, batches, statistics, and everything that is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cveff.runtime
from cveff.errors import BundleError, CveffError, EngineError, InputSizeError
from cveff.export.bundle import write_bundle
from cveff.runtime.cascade import Cascade, in_batches, resized
from cveff.runtime.engines import open_file
from cveff.runtime.manifest import sha256

SMALL, LARGE = (16, 20), (32, 40)


def entry(name: str, file: str, size: tuple[int, int], **changes: Any) -> dict[str, Any]:
    return {
        "stage": name,
        "name": "onnxruntime",
        "precision": "fp32",
        "file": file,
        "threads": 1,
        "options": {},
        "size": list(size),
        "interpolation": "bilinear",
        "goes_on": False,
        "batches": [],
        "threshold": None,
        "exits": 0,
        **changes,
    }


def stages(*files: dict[str, Any], gate: str = "confidence") -> dict[str, Any]:
    reached = {
        "split": "val",
        "count": 100,
        "exits": [60, 40],
        "accuracy": 0.9,
        "mean_latency": 0.6,
        "thresholds": [0.5],
    }
    return {
        "gate": gate,
        "files": list(files),
        "goal": {"mean_latency": None, "accuracy_drop": 0.5},
        "full": {"name": "large alone", "latency_ms": 1.0, "accuracy": 0.9},
        "reference": "large alone",
        "latency_ms": [0.4, 1.4],
        "calibration": reached,
        "evaluation": {"split": "test", "count": 100, "exits": [60, 40]},
        "curve": [reached],
    }


@pytest.fixture
def maker(
    tmp_path: Path, onnx_maker: Callable[..., Path], manifest_maker: Callable[..., dict[str, Any]]
) -> Callable[..., Path]:
    """A bundle of a small network on small images before a large one; `changes` are the first stage's."""
    small = onnx_maker(tmp_path / "small.onnx", size=SMALL, seed=1, scale=6.0)
    large = onnx_maker(tmp_path / "large.onnx", size=LARGE, seed=2)

    def make(gate: str = "confidence", **changes: Any) -> Path:
        first = entry("small", "small.onnx", SMALL, **{"threshold": 0.5, **changes})
        manifest = manifest_maker(
            engine={
                "name": "onnxruntime",
                "file": "large.onnx",
                "threads": 1,
                "options": {},
                "precision": "fp32",
            },
            stages=stages(first, entry("large", "large.onnx", LARGE), gate=gate),
        )
        files = {"small.onnx": small, "large.onnx": large}
        return write_bundle(tmp_path / "two.bundle", manifest=manifest, files=files, report_html="")

    return make


@pytest.fixture
def images() -> np.ndarray:
    """Noise of one colour each: the tiny network looks at mean colours alone."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (37, 1, 1, 3))
    return (colours * random.random((37, *LARGE, 3))).astype(np.uint8)


def alone(bundle: Path, name: str, images: np.ndarray) -> np.ndarray:
    with open_file("onnxruntime", bundle / name, threads=1) as session:
        return session(images)


def edited(bundle: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest["stages"])
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def test_infinite_thresholds_are_the_first_network_and_the_last(
    maker: Callable[..., Path], images: np.ndarray
) -> None:
    bundle = maker()
    with cveff.runtime.open(bundle) as engine:
        cascade = engine.cascade
        assert cascade is not None
        first, left = cascade.answer(images, [-np.inf])
        assert np.array_equal(first, alone(bundle, "small.onnx", resized(images, SMALL, "bilinear")))
        assert not left.any()
        last, left = cascade.answer(images, [np.inf])
        assert np.array_equal(last, alone(bundle, "large.onnx", images))
        assert (left == 1).all()
        assert [item.images for item in cascade.statistics()] == [0, 0]  # such calls are not counted


def test_each_image_gets_the_answer_of_where_it_left(maker: Callable[..., Path], images: np.ndarray) -> None:
    bundle = maker()
    with cveff.runtime.open(bundle) as engine:
        probabilities, left = engine.staged(images)
        assert engine.cascade is not None
        small, large = engine.cascade.exits(images)
        assert 0 < left.sum() < len(left)
        expected = np.where((left == 0)[:, None], small, large)
        assert np.array_equal(engine.logits(images), expected)
        assert np.array_equal(probabilities.argmax(1), expected.argmax(1))
        certain = np.exp(small - small.max(1, keepdims=True))
        certain = (certain / certain.sum(1, keepdims=True)).max(1)
        assert np.array_equal(left == 0, certain >= 0.5)
        one_by_one = np.concatenate([engine.logits(image[None]) for image in images])
        assert np.array_equal(one_by_one, expected)
        assert [item.images for item in engine.cascade.statistics()] == [
            3 * int((left == 0).sum()),
            3 * int(left.sum()),
        ]
        engine.cascade.reset()
        assert [item.images for item in engine.cascade.statistics()] == [0, 0]
        assert engine(images[:0]).shape == (0, 5)


@pytest.mark.parametrize("batches", [[1], [4], [2, 8], [1, 2, 4, 64]])
def test_buckets_change_nothing_but_the_sizes_of_calls(
    maker: Callable[..., Path], images: np.ndarray, batches: list[int]
) -> None:
    with cveff.runtime.open(maker()) as engine:
        expected = engine.logits(images)
    with cveff.runtime.open(maker(batches=batches)) as engine:
        assert np.array_equal(engine.logits(images), expected)


def test_parts_have_the_sizes_of_buckets() -> None:
    seen: list[int] = []

    def run(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(len(values["a"]))
        return {"b": 2 * values["a"]}

    found = in_batches({"a": np.arange(11)}, run, (1, 4))["b"]
    assert found.tolist() == list(range(0, 22, 2)) and seen == [4, 4, 4]
    seen.clear()
    in_batches({"a": np.arange(9)}, run, (1, 4))
    assert seen == [4, 4, 1]


def test_images_are_made_smaller_as_pillow_does(images: np.ndarray) -> None:
    small = resized(images[:2], SMALL, "bicubic")
    expected = Image.fromarray(images[1]).resize(SMALL[::-1], Image.Resampling.BICUBIC)
    assert np.array_equal(small[1], np.asarray(expected))
    grey = resized(images[:2, :, :, :1], SMALL, "bilinear")
    assert grey.shape == (2, *SMALL, 1)
    assert resized(images, LARGE, "bilinear") is images


def test_another_engine_runs_the_same_stages(maker: Callable[..., Path], images: np.ndarray) -> None:
    pytest.importorskip("openvino")
    bundle = maker()
    with cveff.runtime.open(bundle) as own, cveff.runtime.open(bundle, engine="openvino") as other:
        assert other.name == "openvino"
        np.testing.assert_allclose(other.logits(images), own.logits(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(EngineError, match=r"small.onnx \(fp32\), which is not for engine 'openvino:int8'"):
        cveff.runtime.open(bundle, engine="openvino:int8")


def test_an_alarm_is_raised_for_images_that_leave_elsewhere(
    maker: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with cveff.runtime.open(maker(exits=500)) as engine:
        assert engine.cascade is not None
        flat = np.full((256, *LARGE, 3), 127, np.uint8)
        engine(flat)
        all_left = engine.cascade.statistics()[0].share == 1
        assert bool(engine.cascade.alarms) != all_left  # 500 of 500 were calibrated to leave first
        assert ("were calibrated" in caplog.text) != all_left
        engine.cascade.thresholds = [np.inf]
        engine(flat)
        assert engine.cascade.alarms == ()  # what other thresholds do was never calibrated
        engine.cascade.thresholds = [0.5]
        assert engine.cascade.statistics()[0].calibrated == 1


def test_thresholds_of_other_exits_are_refused(maker: Callable[..., Path], images: np.ndarray) -> None:
    with cveff.runtime.open(maker()) as engine:
        cascade = engine.cascade
        assert cascade is not None
        for wrong in ([], [0.5, 0.5]):
            with pytest.raises(CveffError, match=r"for 2 stages, which need 1.*a model with other exits"):
                cascade.thresholds = wrong
            with pytest.raises(CveffError, match="a model with other exits"):
                cascade.answer(images, wrong)
        with pytest.raises(CveffError, match="nan is none"):
            cascade.thresholds = [float("nan")]
        with pytest.raises(InputSizeError, match="the model takes"):
            cascade.answer(images[:, :8])


def test_a_plain_bundle_has_no_stages(tiny_bundle: Path, images: np.ndarray) -> None:
    with cveff.runtime.open(tiny_bundle) as engine:
        assert engine.cascade is None
        with pytest.raises(EngineError, match="has no stages"):
            engine.staged(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(gate="luck"), r"gate is 'luck'; this program knows confidence"),
        (lambda s: s.update(files=s["files"][:1]), "1 files; there must be two or more"),
        (
            lambda s: s["files"][0].update(file="other.onnx"),
            "files does not list 'other.onnx', which stage 'small'",
        ),
        (lambda s: s["files"][0].update(goes_on=True), "goes_on is true, and there is no stage before it"),
        (lambda s: s["files"][1].update(goes_on=True), "takes images, the manifest says otherwise"),
        (lambda s: s["files"][0].update(size=[16]), r"size is \[16\]; it must be \[height, width\]"),
        (
            lambda s: s["files"][0].update(size=[8, 8]),
            r"takes images \(16, 20\) with 3 channels, but the manifest",
        ),
        (lambda s: s["files"][0].update(batches=[4, 2]), r"batches is \[4, 2\]; it must be ascending"),
        (
            lambda s: s["files"][0].update(threshold="high"),
            "threshold is 'high'; it must be an integer or a number",
        ),
        (lambda s: s["files"][0].update(exits=-1), "exits is -1; it must not be negative"),
        (lambda s: s["files"][0].update(interpolation="soft"), "interpolation is 'soft'"),
        (lambda s: s["files"][0].pop("stage"), "lacks the key 'stage'"),
    ],
)
def test_a_damaged_manifest_is_refused(
    maker: Callable[..., Path], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    bundle = edited(maker(), change)
    with pytest.raises(BundleError, match=message):
        cveff.runtime.open(bundle)


def test_a_tampered_stage_is_refused(maker: Callable[..., Path]) -> None:
    bundle = maker()
    content = bytearray((bundle / "small.onnx").read_bytes())
    content[-1] ^= 1
    (bundle / "small.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"small.onnx does not match its SHA-256"):
        cveff.runtime.open(bundle)


def test_a_stage_of_other_classes_is_refused(
    maker: Callable[..., Path], onnx_maker: Callable[..., Path]
) -> None:
    bundle = maker()
    path = onnx_maker(bundle / "small.onnx", size=SMALL, num_classes=3)
    manifest = json.loads((bundle / "manifest.json").read_text())
    listed = next(item for item in manifest["files"] if item["path"] == "small.onnx")
    listed.update(sha256=sha256(path), bytes=path.stat().st_size)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="has 3 classes, but the manifest has 5 labels"):
        cveff.runtime.open(bundle)


def test_the_bundle_runs_itself_without_cveff_or_torch(
    maker: Callable[..., Path], images: np.ndarray, tmp_path: Path
) -> None:
    bundle = shutil.copytree(maker(), tmp_path / "elsewhere.bundle")
    photos = tmp_path / "photos"
    photos.mkdir()
    for index, pixels in enumerate(images[:6]):
        Image.fromarray(np.kron(pixels, np.ones((2, 2, 1), np.uint8))).save(photos / f"{index}.png")
    blocked = "import sys; sys.modules['torch'] = sys.modules['cveff'] = None; sys.argv = sys.argv[1:]; "
    run = f"{blocked}import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", run, str(bundle / "run.py"), str(photos), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd="/")
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    with cveff.runtime.open(bundle) as engine:
        assert isinstance(engine._session, Cascade)
        probabilities, left = engine.staged(engine.preprocess(sorted(photos.iterdir())))
    names = ("small", "large")
    assert [item["stage"] for item in document["images"]] == [names[stage] for stage in left]
    best = [item["predictions"][0]["index"] for item in document["images"]]
    assert best == probabilities.argmax(1).tolist()
    assert [item["images"] for item in document["stages"]] == np.bincount(left, minlength=2).tolist()
    assert document["drift"] == []
