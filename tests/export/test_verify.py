"""Verify: what is well passes, what is not is named, and each failure is found by making it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cveff
from cveff.data import Data
from cveff.errors import CveffError, DataError
from cveff.export.deploy import Deployment
from cveff.export.verify import verify
from cveff.model import Model


def copied(bundle: Path, destination: Path) -> Path:
    return Path(shutil.copytree(bundle, destination))


def with_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Rewrite the manifest, which no hash covers."""
    path = bundle / "manifest.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    return bundle


def disturbed(model: Model, amount: float) -> Model:
    """The same architecture with other weights in its last layer."""
    import copy

    module = copy.deepcopy(model.module)
    with torch.no_grad():
        list(module.parameters())[-2].mul_(1 - amount)
        list(module.parameters())[-2][0].add_(amount)
    return Model(model.spec, module)


def test_a_fresh_bundle_is_what_it_claims(deployment: Deployment, digits_model: Model, digits: Data) -> None:
    found = verify(deployment.path, data=digits, against=digits_model, threads=1)
    metrics = deployment.manifest["metrics"]
    assert found.ok and found.problems == ()
    assert found.accuracy == found.claimed_accuracy == metrics["accuracy"]["deployed"]
    assert found.reference_accuracy == metrics["accuracy"]["reference"]
    assert found.agreement == metrics["agreement"]
    assert (found.split, found.num_images) == (metrics["images"]["split"], metrics["images"]["count"])
    assert all(layer.cosine > 0.9 for layer in found.layers)
    assert json.loads(json.dumps(found.to_json()))["ok"] is True


def test_an_exported_file_equals_its_model_layer_by_layer(
    digits_model: Model, digits: Data, tmp_path: Path
) -> None:
    path = cveff.export(digits_model, tmp_path / "model.onnx")
    found = verify(path, data=digits, against=digits_model, threads=1)
    assert found.ok and found.precision == "fp32"
    assert found.agreement == 1.0 and found.accuracy == found.reference_accuracy
    assert found.layers
    assert found.first_large_difference is None
    assert all(layer.relative_difference < 1e-4 for layer in found.layers)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_int8_file_is_compared_layer_by_layer_with_the_model_it_came_from(
    digits_model: Model, digits: Data, tmp_path: Path, engine: str
) -> None:
    from cveff.compress import Quantize
    from cveff.data import calibration_images
    from cveff.export.openvino import quantize_openvino

    if engine == "onnxruntime":
        rounded = cveff.apply(digits_model, Quantize(images=32), data=digits)
        path = cveff.export(rounded, tmp_path / "int8.onnx")
    else:
        source = cveff.export(digits_model, tmp_path / "model.onnx", check=False)
        assert digits.train is not None
        images = calibration_images(digits.train, digits_model.spec.input, 32, seed=0)
        path = quantize_openvino(source, tmp_path / "int8.xml", images)
    found = verify(path, data=digits, against=digits_model, max_accuracy_drop=10, threads=1)
    assert found.ok and found.precision == "int8" and found.engine == engine
    assert len(found.layers) > 5
    assert all(layer.cosine > 0.9 for layer in found.layers)


def test_a_file_of_other_weights_is_found_and_the_layer_named(
    digits_model: Model, digits: Data, tmp_path: Path
) -> None:
    path = cveff.export(disturbed(digits_model, 0.5), tmp_path / "model.onnx")
    found = verify(path, data=digits, against=digits_model, threads=1)
    assert not found.ok
    assert any("computes something else" in problem for problem in found.problems)
    assert found.first_large_difference == found.layers[-1]


def test_without_data_random_pixels_still_tell(digits_model: Model, tmp_path: Path) -> None:
    path = cveff.export(digits_model, tmp_path / "model.onnx")
    assert verify(path, against=digits_model, threads=1).ok
    found = verify(path, against=disturbed(digits_model, 0.5), threads=1)
    assert not found.ok and found.accuracy is None


def test_accuracy_under_the_limit_is_a_problem(digits_model: Model, digits: Data, tmp_path: Path) -> None:
    path = cveff.export(disturbed(digits_model, 3.0), tmp_path / "model.onnx")
    found = verify(path, data=digits, against=digits_model, max_accuracy_drop=0.5, threads=1)
    assert any(
        "points of accuracy against small_resnet_s, the limit is 0.5" in problem for problem in found.problems
    )


def test_a_claim_that_does_not_hold_is_a_problem(
    deployment: Deployment, digits: Data, tmp_path: Path
) -> None:
    def boast(values: dict[str, Any]) -> None:
        values["metrics"]["accuracy"]["deployed"] = 0.9999

    bundle = with_manifest(copied(deployment.path, tmp_path / "b"), boast)
    found = verify(bundle, data=digits, threads=1)
    assert not found.ok and "under the 99.99% the manifest claims" in found.problems[0]
    assert verify(bundle, data=digits, threads=1, tolerance=100).ok


def test_claims_of_other_images_are_not_compared(deployment: Deployment, digits: Data) -> None:
    other = replace(digits, test=None, val=digits.val.subset(range(30)))
    found = verify(deployment.path, data=other, threads=1)
    assert found.claimed_accuracy is None and found.num_images == 30
    assert any("not compared" in note for note in found.notes)


@pytest.mark.parametrize("file", ["model.onnx", "report.html", "runtime/engine.py"])
def test_a_tampered_bundle_is_not_ok(deployment: Deployment, tmp_path: Path, file: str) -> None:
    bundle = copied(deployment.path, tmp_path / "b")
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    found = verify(bundle)
    assert not found.ok and file in found.problems[0]


def test_a_newer_schema_is_not_ok(deployment: Deployment, tmp_path: Path) -> None:
    bundle = with_manifest(
        copied(deployment.path, tmp_path / "b"), lambda values: values.update(schema_version=99)
    )
    found = verify(bundle)
    assert not found.ok and "upgrade cveff" in found.problems[0]


def test_another_processor_is_noted(deployment: Deployment, tmp_path: Path) -> None:
    bundle = with_manifest(
        copied(deployment.path, tmp_path / "b"),
        lambda values: values["machine"].update(isa=["sve2", "amx_fp16"]),
    )
    found = verify(bundle, threads=1)
    from cveff.runtime.machine import isa

    if isa():
        assert any("This processor lacks" in note for note in found.notes)
    assert found.ok


def test_what_is_not_comparable_is_refused(deployment: Deployment, digits_model: Model, digits: Data) -> None:
    with pytest.raises(DataError, match="10 classes but digits has 2"):
        verify(deployment.path, data=replace(digits, labels=("a", "b")), threads=1)
    other = cveff.create("small_resnet_s", num_classes=3, image_size=8, channels=1)
    with pytest.raises(DataError, match="not the same model"):
        verify(deployment.path, against=other, threads=1)
    larger = cveff.create("small_resnet_s", num_classes=10, image_size=28, channels=1)
    with pytest.raises(CveffError, match="not the same model"):
        verify(deployment.path, against=larger, threads=1)
    with pytest.raises(CveffError, match="does not exist"):
        verify("nosuch.bundle")


def test_a_model_alone_is_only_scored(digits_model: Model, digits: Data) -> None:
    found = verify(digits_model, data=digits, threads=1)
    assert found.ok and found.reference is None and found.agreement is None and found.accuracy is not None
