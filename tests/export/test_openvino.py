"""Laws of OpenVINO's files and NNCF's int8: the same logits, both files or neither, silence, clear refusals."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import cveff
from cveff.errors import CveffError, ExportError, MissingDependencyError
from cveff.export.onnx import example_images, export
from cveff.export.openvino import convert, quantize_openvino
from cveff.measure.parity import relative_difference
from cveff.runtime.engines import open_file

openvino = pytest.importorskip("openvino")
nncf = pytest.importorskip("nncf")


@pytest.fixture(scope="module", params=["test_efficientnet", "test_vit"])
def source(request, tmp_path_factory) -> tuple[Path, np.ndarray, np.ndarray]:
    """An exported file (one with depthwise convolutions, one with attention), calibration and held-out images."""
    torch.manual_seed(0)
    model = cveff.create(request.param, num_classes=10, image_size=64)
    path = export(model, tmp_path_factory.mktemp("source") / "model.onnx", check=False)
    return path, example_images(4, model, seed=1), example_images(8, model, seed=2)


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory) -> Path:
    return quantize_openvino(source[0], tmp_path_factory.mktemp("int8") / "model.xml", source[1])


def _logits(path: Path, images: np.ndarray) -> np.ndarray:
    engine, options = (
        ("openvino", {"inference_precision": "f32"}) if path.suffix == ".xml" else ("onnxruntime", None)
    )
    with open_file(engine, path, threads=1, options=options) as session:
        return session(images)


def test_converted_file_gives_the_same_logits_at_every_batch(source, tmp_path):
    path = convert(source[0], tmp_path / "model.xml")
    assert {file.name for file in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    for batch in (1, 3):
        images = source[2][:batch]
        assert relative_difference(_logits(path, images), _logits(source[0], images)) <= 1e-4


def test_half_precision_halves_the_weights(source, tmp_path):
    convert(source[0], tmp_path / "full.xml")
    half = convert(source[0], tmp_path / "half.xml", compress_to_fp16=True)
    assert (tmp_path / "half.bin").stat().st_size < 0.6 * (tmp_path / "full.bin").stat().st_size
    assert relative_difference(_logits(half, source[2]), _logits(source[0], source[2])) < 0.02


def test_int8_stays_close_and_is_int8(source, quantized):
    expected = _logits(source[0], source[2])
    error = np.linalg.norm(_logits(quantized, source[2]) - expected)
    assert error < 0.5 * np.linalg.norm(expected - expected.mean(0))
    model = openvino.Core().read_model(quantized)
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert "FakeQuantize" in kinds
    types = {str(node.get_element_type()) for node in model.get_ops() if node.get_type_name() == "Constant"}
    assert any("int8" in name or "i8" in name for name in types)


def test_pixels_stay_in_float(quantized):
    model = openvino.Core().read_model(quantized)
    (images,) = model.inputs
    node, kinds = images.get_node(), []
    while node.get_type_name() != "FakeQuantize":
        readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
        (node,) = [reader for reader in readers if reader.get_type_name() != "ShapeOf"]  # the batch's size
        kinds.append(node.get_type_name())
    assert kinds[1] in ("Subtract", "Add")
    assert [kinds[0], *kinds[2:]] == ["Convert", "Transpose", "FakeQuantize"]


def test_default_preset_follows_the_activations_and_same_settings_give_the_same_weights(
    source, quantized, tmp_path
):
    """Both networks have SiLU or GELU, whose ranges are lopsided: "mixed" is the default."""
    same = quantize_openvino(source[0], tmp_path / "mixed.xml", source[1], preset="mixed")
    other = quantize_openvino(source[0], tmp_path / "performance.xml", source[1], preset="performance")
    expected = _logits(quantized, source[2])
    assert same.with_suffix(".bin").read_bytes() == quantized.with_suffix(".bin").read_bytes()
    assert np.array_equal(_logits(same, source[2]), expected)
    assert not np.array_equal(_logits(other, source[2]), expected)


def test_smoothing_is_chosen_by_its_error(tmp_path):
    """Whichever of the two is closer on the calibration images is kept, and a convolutional network has no choice."""
    torch.manual_seed(0)
    model = cveff.create("test_vit", num_classes=10, image_size=64)
    path, images = export(model, tmp_path / "model.onnx", check=False), example_images(4, model, seed=1)
    expected = _logits(path, images)
    errors = {}
    for smooth in (False, True, None):
        made = quantize_openvino(path, tmp_path / f"{smooth}.xml", images, smooth=smooth)
        errors[smooth] = float(np.square(_logits(made, images) - expected).sum())
    assert errors[False] != errors[True]
    assert errors[None] == min(errors.values())


def test_quantizing_is_silent_and_leaves_the_loggers_alone(source, tmp_path, capfd):
    level, handlers = nncf.nncf_logger.level, [handler.level for handler in nncf.nncf_logger.handlers]
    quantize_openvino(source[0], tmp_path / "model.xml", source[1][:2])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert (nncf.nncf_logger.level, [handler.level for handler in nncf.nncf_logger.handlers]) == (
        level,
        handlers,
    )


def test_torchs_builder_of_extensions_does_not_warn_of_a_missing_device(
    source, tmp_path, monkeypatch, caplog
):
    builder, quantize = logging.getLogger("torch.utils.cpp_extension"), nncf.quantize

    def warns(*arguments, **settings):
        builder.warning("No CUDA runtime is found")
        return quantize(*arguments, **settings)

    monkeypatch.setattr(nncf, "quantize", warns)
    level = builder.level
    quantize_openvino(source[0], tmp_path / "model.xml", source[1][:1])
    assert not [record for record in caplog.records if record.name == builder.name]
    assert builder.level == level


def test_nothing_is_reported_over_the_network(source, tmp_path, monkeypatch):
    """OpenVINO's converter and NNCF report their use to their makers unless told not to."""
    for name in ("CI", "NNCF_CI"):
        monkeypatch.delenv(name, raising=False)
    telemetry = pytest.importorskip("openvino_telemetry")
    sent: list[object] = []
    sender = importlib.import_module("openvino_telemetry.utils.sender").TelemetrySender
    monkeypatch.setattr(sender, "send", lambda *arguments: sent.append(arguments))
    monkeypatch.setattr(telemetry.Telemetry, "_SingletonMetaClass__single_instance", None)
    quantize_openvino(source[0], tmp_path / "model.xml", source[1][:1])
    assert sent == []
    assert "CI" not in os.environ


@pytest.mark.parametrize("failing", ["model.xml", "model.bin"])
def test_both_files_or_neither(source, tmp_path, failing):
    (tmp_path / failing).mkdir()
    with pytest.raises(CveffError, match="cannot write"):
        convert(source[0], tmp_path / "model.xml")
    assert [path.name for path in tmp_path.iterdir()] == [failing]


def test_a_destination_that_is_not_xml_is_refused(source, tmp_path):
    for build in (convert, lambda *paths: quantize_openvino(*paths, source[1])):
        with pytest.raises(ExportError, match=r"\.xml"):
            build(source[0], tmp_path / "model.ir")


def test_unusable_calibration_and_settings_are_refused(source, tmp_path):
    path, images, _ = source
    out = tmp_path / "model.xml"
    with pytest.raises(ExportError, match="no calibration images"):
        quantize_openvino(path, out, images[:0])
    with pytest.raises(ExportError, match="float32"):
        quantize_openvino(path, out, images.astype(np.float32))
    with pytest.raises(ExportError, match=r"32×64×3.*64×64×3"):
        quantize_openvino(path, out, images[:, :32])
    with pytest.raises(ExportError, match=r"'fast'.*performance"):
        quantize_openvino(path, out, images, preset="fast")
    with pytest.raises(ExportError, match="does not exist"):
        quantize_openvino(tmp_path / "absent.onnx", out, images)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_quantizer_is_named(source, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no statistics\nlong story")

    monkeypatch.setattr(nncf, "quantize", fails)
    with pytest.raises(ExportError, match=r"NNCF: RuntimeError: no statistics$"):
        quantize_openvino(source[0], tmp_path / "model.xml", source[1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_a_missing_package_is_named_with_the_extra_that_installs_it(source, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package} is not installed.*cveff\[openvino\]"):
        quantize_openvino(source[0], tmp_path / "model.xml", source[1])
    assert list(tmp_path.iterdir()) == []


def test_operators_that_openvino_lacks_are_named(tmp_path):
    from onnx import TensorProto, helper

    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 8, 8, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5])
    graph = helper.make_graph(
        [helper.make_node("Strange", ["images"], ["logits"], domain="acme")], "g", [images], [logits]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("acme", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"OpenVINO cannot read .*acme\.Strange"):
        convert(tmp_path / "model.onnx", tmp_path / "model.xml")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
