"""An open bundle: probabilities, the choice among engines, threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cveff
from cveff.errors import EngineError, ImageError, InputSizeError
from cveff.export.bundle import write_bundle
from cveff.runtime import machine
from cveff.runtime.engine import softmax
from cveff.runtime.preprocess import preprocess

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 40, 3), dtype=np.uint8)


def test_images_in_probabilities_out(tiny_bundle: Path) -> None:
    with cveff.runtime.open(tiny_bundle) as engine:
        probabilities = engine(IMAGES)
        assert (probabilities.shape, probabilities.dtype) == ((4, 5), np.float32)
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
        np.testing.assert_array_equal(probabilities, softmax(engine.logits(IMAGES)))
        assert engine(IMAGES[:0]).shape == (0, 5)
        assert engine.labels == ("cat", "dog", "bird", "fish", "tree")
        assert (engine.name, engine.precision, engine.path) == ("onnxruntime", "fp32", tiny_bundle)
        assert engine.spec.size == (32, 40)
        assert engine.manifest["model"]["name"] == "tiny net"


def test_preprocess_is_the_shared_function(tiny_bundle: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (51, 77, 3), dtype=np.uint8)
    with cveff.runtime.open(tiny_bundle) as engine:
        np.testing.assert_array_equal(engine.preprocess([image]), preprocess([image], engine.spec))
        assert engine.preprocess(Image.fromarray(image)).shape == (1, 32, 40, 3)
        with pytest.raises(InputSizeError):
            engine.preprocess(image[:5])
        assert engine.preprocess(image[:5], resize=True).shape == (1, 32, 40, 3)
        with pytest.raises(ImageError):
            engine.preprocess("none.png")


def test_both_engines_of_a_bundle_agree(tiny_bundle: Path) -> None:
    with (
        cveff.runtime.open(tiny_bundle) as first,
        cveff.runtime.open(tiny_bundle, engine="openvino") as second,
    ):
        assert (first.name, second.name) == ("onnxruntime", "openvino")
        np.testing.assert_allclose(first(IMAGES), second(IMAGES), rtol=1e-4, atol=1e-6)


def test_the_first_file_of_an_engine_or_the_one_of_a_precision(
    tmp_path: Path, tiny_onnx: Path, manifest_maker: Callable[..., dict[str, Any]]
) -> None:
    second = {"name": "onnxruntime", "precision": "int8", "file": "int8.onnx", "threads": 1, "options": {}}
    bundle = write_bundle(
        tmp_path / "b",
        manifest=manifest_maker(alternatives=[second]),
        files={"model.onnx": tiny_onnx, "int8.onnx": tiny_onnx},
        report_html="",
    )
    for wanted, precision in [(None, "fp32"), ("onnxruntime", "fp32"), ("onnxruntime:int8", "int8")]:
        with cveff.runtime.open(bundle, engine=wanted) as engine:
            assert engine.precision == precision
    with pytest.raises(EngineError, match="'openvino'; it has onnxruntime:fp32, onnxruntime:int8"):
        cveff.runtime.open(bundle, engine="openvino")


@pytest.mark.parametrize("engine", ["tensorrt:int8", "", "openvino:int8", "OpenVINO"])
def test_an_engine_that_is_not_shipped(tiny_bundle: Path, engine: str) -> None:
    with pytest.raises(EngineError, match="it has onnxruntime:fp32, openvino:fp32"):
        cveff.runtime.open(tiny_bundle, engine=engine)


def test_threads(tiny_bundle: Path) -> None:
    with cveff.runtime.open(tiny_bundle) as engine:
        assert engine.threads == 1  # as measured
    with cveff.runtime.open(tiny_bundle, threads=3) as engine:
        assert engine.threads == 3  # as asked, even past the cores
    for threads in (0, -2):
        with pytest.raises(EngineError, match="threads is"):
            cveff.runtime.open(tiny_bundle, threads=threads)


def test_measured_threads_are_capped_by_the_cores_of_the_device(
    tmp_path: Path, tiny_onnx: Path, manifest_maker: Callable[..., dict[str, Any]]
) -> None:
    for threads in (0, 512):
        engine = {"name": "onnxruntime", "file": "model.onnx", "threads": threads, "options": {}}
        bundle = write_bundle(
            tmp_path / "b",
            manifest=manifest_maker(engine=engine),
            files={"model.onnx": tiny_onnx},
            report_html="",
        )
        with cveff.runtime.open(bundle) as opened:
            assert opened.threads == machine.usable_cores()


def test_softmax_is_stable_and_exact_where_mathematics_is() -> None:
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_array_equal(softmax(np.full((1, 4), 3e38, np.float32)), np.full((1, 4), 0.25))
        np.testing.assert_array_equal(softmax(np.float32([[-3e38, 0, 3e38]])), [[0, 0, 1]])
        logits = np.random.default_rng(0).normal(0, 30, (100, 7)).astype(np.float32)
        exact = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
        exact /= exact.sum(1, keepdims=True)
        np.testing.assert_allclose(softmax(logits), exact, rtol=1e-5, atol=1e-30)
    assert softmax(logits).dtype == np.float32


def test_logits_that_are_not_finite_are_an_error(
    tmp_path: Path, onnx_maker: Callable[..., Path], manifest_maker: Callable[..., dict[str, Any]]
) -> None:
    broken = onnx_maker(tmp_path / "m.onnx", scale=float("inf"))
    bundle = write_bundle(
        tmp_path / "b", manifest=manifest_maker(), files={"model.onnx": broken}, report_html=""
    )
    with cveff.runtime.open(bundle) as engine, pytest.raises(EngineError, match="not finite"):
        engine(IMAGES)


def test_a_closed_bundle_cannot_predict(tiny_bundle: Path) -> None:
    engine = cveff.runtime.open(tiny_bundle)
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        engine(IMAGES)
