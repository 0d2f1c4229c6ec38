"""Features of earlier frames: whose answer a frame takes over, in one call or over several, and what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cveff.runtime
from cveff.errors import CveffError
from cveff.export.bundle import write_bundle
from cveff.runtime.cascade import Cascade
from cveff.runtime.reuse import VALUES, FeatureReuse, difference, signatures
from cveff.runtime.run import main

SIZE, CLASSES = (32, 40), 5
FEATURES = "carried.features"


def write_stage(
    path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any]
) -> Path:
    import onnx
    from onnx import helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "stage",
        inputs,
        outputs,
        [numpy_helper.from_array(np.asarray(v), name) for name, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A network in two: means of areas and an answer to them, then an answer to their squares."""
    onnx = pytest.importorskip("onnx")
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    random = np.random.default_rng(3)
    images = info("images", onnx.TensorProto.UINT8, ["N", *SIZE, 3])
    logits = info("logits", onnx.TensorProto.FLOAT, ["N", CLASSES])
    carried = info(FEATURES, onnx.TensorProto.FLOAT, ["N", 3, 4, 5])
    head = random.normal(size=(60, CLASSES)).astype(np.float32) / 2
    first = [
        node("Cast", ["images"], ["pixels"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["pixels", "scale"], ["scaled"]),
        node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        node("AveragePool", ["planes"], [FEATURES], kernel_shape=[8, 8], strides=[8, 8]),
        node("Flatten", [FEATURES], ["flat"]),
        node("MatMul", ["flat", "head"], ["logits"]),
    ]
    second = [
        node("Mul", [FEATURES, FEATURES], ["squares"]),
        node("Flatten", ["squares"], ["flat"]),
        node("MatMul", ["flat", "head"], ["logits"]),
    ]
    weights = {"scale": np.float32(1 / 255), "head": head}
    return {
        "first.onnx": write_stage(tmp_path / "first.onnx", first, [images], [logits, carried], weights),
        "second.onnx": write_stage(
            tmp_path / "second.onnx", second, [carried], [logits], {"head": -2 * head}
        ),
    }


@pytest.fixture
def bundle(files: dict[str, Path], tmp_path: Path, manifest_maker: Callable[..., dict[str, Any]]) -> Path:
    def entry(name: str, **changes: Any) -> dict[str, Any]:
        file = f"{name}.onnx"
        values = {"stage": name, "name": "onnxruntime", "precision": "fp32", "file": file, "threads": 1}
        values |= {
            "options": {},
            "size": list(SIZE),
            "interpolation": "bilinear",
            "goes_on": False,
            "batches": [],
        }
        return values | {"threshold": None, "exits": 0} | changes

    reached = {"split": "val", "count": 9, "exits": [0, 9], "accuracy": 0.9, "mean_latency": 1.0}
    manifest = manifest_maker(
        engine={
            "name": "onnxruntime",
            "file": "first.onnx",
            "threads": 1,
            "options": {},
            "precision": "fp32",
        },
        stages={
            "gate": "confidence",
            "files": [entry("first", threshold=0.9), entry("second", goes_on=True)],
            "goal": {"mean_latency": None, "accuracy_drop": 0.5},
            "full": {"name": "both", "latency_ms": 1.0, "accuracy": 0.9},
            "reference": "both",
            "latency_ms": [0.4, 1.0],
            "calibration": {**reached, "thresholds": [0.9]},
            "evaluation": {"split": "test", "count": 9, "exits": [0, 9]},
            "curve": [{**reached, "thresholds": [0.9]}],
        },
    )
    return write_bundle(tmp_path / "video.bundle", manifest=manifest, files=files, report_html="")


@pytest.fixture
def cascade(bundle: Path) -> Iterator[Cascade]:
    with cveff.runtime.open(bundle) as engine:
        assert engine.cascade is not None
        yield engine.cascade


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    """Three scenes under noise, the first once more at the end."""
    random = np.random.default_rng(5)
    scenes = [random.integers(0, 200, (4, 5, 3)).repeat(8, 0).repeat(8, 1) for _ in range(3)]
    frames = [scenes[index] for index in (0,) * 6 + (1,) * 7 + (2,) * 5 + (0,) * 4]
    return np.stack([frame + random.integers(0, 50, frame.shape) for frame in frames]).astype(np.uint8)


def expected(cascade: Cascade, video: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Logits, stages and how many are taken over, one frame at a time from the definition."""
    every, left = cascade.answer(video, cascade.thresholds)
    last, answer, reused = None, None, 0
    for index, frame in enumerate(video):
        stays, carried = cascade.features(frame[None])
        if not stays[0]:
            continue
        features = signatures(carried)[0]
        if last is not None and difference(features, last) <= threshold:
            every[index], left[index] = answer
            reused += 1
        else:
            last, answer = features, (every[index].copy(), left[index])
    return every, left, reused


@pytest.mark.parametrize("batch", [1, 4, 22])
@pytest.mark.parametrize("leaving", [-np.inf, 0.9, np.inf])
def test_frames_take_over_what_the_last_that_went_on_was_told(
    cascade: Cascade, video: np.ndarray, batch: int, leaving: float
) -> None:
    cascade.thresholds = (leaving,)
    logits, stages, reused = expected(cascade, video, 3.0)
    reuse = FeatureReuse(3.0)
    parts = [cascade.answer(video[i : i + batch], reuse=reuse) for i in range(0, len(video), batch)]
    assert np.allclose(np.concatenate([part[0] for part in parts]), logits, atol=1e-5)
    assert np.array_equal(np.concatenate([part[1] for part in parts]), stages)
    assert (reuse.frames, reuse.reused) == (22, reused)
    assert reuse.share_reused == reused / 22
    counts = np.bincount(stages, minlength=2)
    assert [item.images for item in cascade.statistics()] == counts.tolist()
    if leaving == np.inf:
        assert reused == 18  # noise averages out: one frame of each of four scenes goes on
    if leaving == 0.9:
        assert 0 < (stages == 0).sum() < 22 and 0 < reused < 18
    if leaving == -np.inf:
        assert reused == 0


def test_at_zero_only_equal_features_pass(cascade: Cascade, video: np.ndarray) -> None:
    cascade.thresholds = (np.inf,)
    reuse = FeatureReuse(0)
    twice = video[[0, 0, 1, 1, 0]]
    logits, _ = cascade.answer(twice, reuse=reuse)
    assert reuse.reused == 2 and np.array_equal(logits, cascade.answer(twice, (np.inf,))[0])


def test_a_failed_call_is_not_remembered(
    cascade: Cascade, video: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade.thresholds = (np.inf,)
    reuse = FeatureReuse(3.0)
    cascade.answer(video[:1], reuse=reuse)
    with monkeypatch.context() as patch:
        patch.setattr(
            cascade._sessions[1], "go_on", lambda values: (_ for _ in ()).throw(CveffError("out of memory"))
        )
        with pytest.raises(CveffError, match="out of memory"):
            cascade.answer(video[8:9], reuse=reuse)
    assert np.array_equal(
        cascade.answer(video[8:9], reuse=reuse)[0], cascade.answer(video[8:9], (np.inf,))[0]
    )


def test_signatures_are_an_even_sample() -> None:
    random = np.random.default_rng(0)
    big = random.normal(size=(2, 64, 40, 40)).astype(np.float32)
    found = signatures({"b": big, "a": np.ones((2, 3), np.float16)})
    assert found.dtype == np.float32 and VALUES / 2 < found.shape[1] <= 1.1 * VALUES
    assert difference(found[0], found[1]) == pytest.approx(
        100 * np.abs(big[0] - big[1]).mean() / np.abs(big[1]).mean(), rel=0.05
    )
    nothing = np.zeros(4, np.float32)
    assert difference(nothing, nothing) == 0 and difference(nothing + 1, nothing) == np.inf


def test_the_command_line(
    bundle: Path, video: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(video):
        Image.fromarray(frame).save(folder / f"frame{index}.png")
    assert main([str(bundle), str(folder), "--calibrate-features", "0.9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["frames"] == found["measured"]["frames"] == 11
    assert found["chosen"]["agreement"] >= 0.9 and found["chosen"]["skipped"] > 0
    assert main([str(bundle), str(folder), "--calibrate-features", "0.9"]) == 0
    assert capsys.readouterr().out.startswith(
        f"--reuse-features {found['chosen']['threshold']:g}: on 11 frames"
    )
    for batch in ("1", "8"):
        assert main([str(bundle), str(folder), "--reuse-features", "3", "--json", "--batch-size", batch]) == 0
        out, err = capsys.readouterr()
        document = json.loads(out)
        reused = document["features"]["reused"]
        assert document["features"] == {"percent": 3.0, "frames": 22, "reused": reused} and reused > 0
        assert f"{reused} of 22 computed frames took over what later stages had found" in err
    assert main([str(bundle), str(folder), "--reuse-features", "3", "--skip-similar", "255"]) == 0
    assert (
        "21 of 22 frames took over the answer" in (err := capsys.readouterr().err)
        and "0 of 1 computed" in err
    )


def test_what_cannot_be_reused_is_said(
    bundle: Path,
    cascade: Cascade,
    tiny_bundle: Path,
    video: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(CveffError, match="give percent of their magnitude"):
            FeatureReuse(wrong)
    frame = tmp_path / "frame.png"
    Image.fromarray(video[0]).save(frame)
    assert main([str(tiny_bundle), str(frame), "--reuse-features", "3"]) == 2
    assert "has no stages, so there are no features" in capsys.readouterr().err
    assert main([str(bundle), str(frame), "--reuse-features", "101"]) == 2
    assert main([str(bundle), str(frame), "--calibrate-features", "1"]) == 2
    assert "give two or more" in capsys.readouterr().err
    assert main([str(bundle), str(frame), "--calibrate-features", "1", "--calibrate-similar", "1"]) == 2
    assert "one at a time" in capsys.readouterr().err
    cascade.stages = tuple(type(stage)(stage.name, stage.file, stage.size) for stage in cascade.stages)
    with pytest.raises(CveffError, match="starts from the image again"):
        cascade.answer(video, reuse=FeatureReuse(1))
