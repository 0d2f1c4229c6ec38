"""A target with other instruction sets than this machine: what is built for it, and what is said of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import cveff
from cveff.compress.quant.capture import capture
from cveff.compress.quant.layers import find_layers
from cveff.compress.quant.saturation import predict_saturation
from cveff.compress.quantize import Quantize
from cveff.data import Data, calibration_images
from cveff.data.augment import normalize
from cveff.export import int8 as int8_files
from cveff.export.candidates import Candidate
from cveff.export.clipping import Clipping
from cveff.export.deploy import deploy
from cveff.export.instructions import instruction_warnings
from cveff.export.int8 import Int8
from cveff.model import Model
from cveff.runtime.manifest import model_files
from cveff.target import Target

AVX2 = ("avx2", "fma", "f16c")
VNNI = (*AVX2, "avx512_vnni", "avx512_bf16")
USERS = (
    "cveff.runtime.machine",
    "cveff.target",
    "cveff.export.build_candidates",
    "cveff.export.instructions",
)


def target(instructions: tuple[str, ...] | None, *candidates: tuple[str, str]) -> Target:
    pairs = candidates or (("onnxruntime", "fp32"),)
    return Target("box", "", pairs, threads=1, batch_sizes=(1,), instructions=instructions)


def set_machine(monkeypatch: pytest.MonkeyPatch, instructions: tuple[str, ...]) -> None:
    for user in USERS:
        monkeypatch.setattr(f"{user}.isa", lambda: list(instructions))


@pytest.fixture(scope="module")
def calibration(digits_model: Model, digits: Data) -> np.ndarray:
    assert digits.train is not None
    return calibration_images(digits.train, digits_model.spec.input, 64, seed=0)


@pytest.fixture(scope="module")
def clipping_model(digits_model: Model, digits: Data) -> Model:
    """The network with one layer's first channel all large weights of one sign, where inputs are positive."""
    model = Model(digits_model.spec, copy.deepcopy(digits_model.module))
    weight = model.module.get_parameter("fc.weight")
    with torch.no_grad():
        weight[0] = weight.abs().max()
    return model


def test_channels_that_would_clip_are_narrowed_for_a_target_that_clips(
    clipping_model: Model, digits: Data, calibration: np.ndarray, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    plain = Int8(clipping_model, calibration, folders[0], digits.val, 1.0, clips=False)
    assert plain.clipping(plain.onnx()) is None
    batches = list(normalize(calibration, clipping_model.spec.input).split(32))
    unguarded = predict_saturation(plain._quantized().graph, batches)
    assert sum(int(layer.severe.sum()) for layer in unguarded.values()) > 0
    guarded = Int8(clipping_model, calibration, folders[1], digits.val, 1.0, clips=True)
    found = guarded.clipping(guarded.onnx())
    assert found is not None and found.guard == "narrow" and found.images == 64
    assert 1 <= found.layers <= found.narrowed
    assert found.severe == 0
    assert found.clipping <= sum(layer.channels for layer in unguarded.values())


def test_other_engines_quantizers_get_the_images_that_ranges_were_made_from(
    digits_model: Model,
    digits: Data,
    calibration: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    int8 = Int8(digits_model, calibration, tmp_path, digits.val, 1.0)
    assert int8.usual_images() is calibration
    int8._quantized().left_out = 2
    marked = torch.zeros(len(calibration), dtype=torch.bool)
    marked[[5, 9]] = True
    monkeypatch.setattr(int8_files, "odd_images", lambda exact, batches: marked)
    assert np.array_equal(int8.usual_images(), np.delete(calibration, [5, 9], axis=0))


@pytest.mark.parametrize(("scheme", "kind"), [("cpu", "uint8"), ("cpu-signed", "int8")])
def test_a_targets_scheme_is_that_of_the_file(
    digits_model: Model, digits: Data, calibration: np.ndarray, tmp_path: Path, scheme: Any, kind: str
) -> None:
    path = Int8(digits_model, calibration, tmp_path, digits.val, 1.0, scheme=scheme).onnx()
    graph = onnx.load(path).graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    points = [constants[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert points and {str(point.dtype) for point in points} == {kind}


def test_a_model_that_came_in_quantized_is_only_predicted(
    clipping_model: Model, digits: Data, calibration: np.ndarray, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"images": 64, "method": "minmax", "weights": "nearest", "equalize": False}
    for saturation, is_severe in (("ignore", True), ("narrow", False)):
        model = cveff.apply(clipping_model, Quantize(saturation=saturation, **settings), data=digits)
        int8 = Int8(model, calibration, tmp_path, digits.val, 1.0, clips=True)
        found = int8.clipping(tmp_path / "model.onnx")
        assert found is not None and (found.guard, found.narrowed, found.layers) == ("none", 0, 0)
        assert (found.severe > 0) is is_severe


def test_a_deployment_for_a_target_without_vnni_says_what_was_not_measured(
    digits_model: Model, digits: Data, tmp_path: Path, quick_timing: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    set_machine(monkeypatch, VNNI)
    device = target(AVX2, ("onnxruntime", "int8"), ("openvino", "int8"), ("openvino", "bf16"))
    made = deploy(
        digits_model, data=digits, target=device, out=tmp_path / "b", num_calibration=64, max_accuracy_drop=5
    )
    assert made.manifest["instructions"] == list(AVX2)
    assert made.manifest["machine"]["isa"] == list(VNNI)
    assert model_files(made.manifest)[0].is_guarded
    onnx, openvino, bf16 = made.manifest["candidates"]
    assert onnx["saturation"]["guard"] == "narrow" and onnx["saturation"]["images"] == 64
    assert openvino["saturation"]["guard"] == "half_range"
    assert bf16["why"].endswith("target box has no bfloat16 arithmetic: its instructions are avx2, fma, f16c")
    page = (made.path / "report.html").read_text(encoding="utf-8")
    assert "Predicted from 64 calibration images" in page
    assert "weights were rounded to 7 bits" in page
    assert "Times were measured on a machine with avx512_vnni, avx512_bf16, unlike target box" in page


def test_a_deployment_for_this_machine_says_nothing_of_it(
    digits_model: Model, digits: Data, tmp_path: Path, quick_timing: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_machine(monkeypatch, VNNI)
    device = target(None, ("onnxruntime", "int8"))
    made = deploy(
        digits_model, data=digits, target=device, out=tmp_path / "b", num_calibration=16, max_accuracy_drop=5
    )
    assert made.manifest["instructions"] == list(VNNI)
    assert "saturation" not in made.manifest["engine"]
    assert "Times were measured on a machine" not in (made.path / "report.html").read_text(encoding="utf-8")


def test_openvino_s_weights_have_seven_bits_for_a_target_that_clips(
    digits_model: Model, calibration: np.ndarray, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    from cveff.export.openvino import quantize_openvino

    source = cveff.export(digits_model, tmp_path / "model.onnx", check=False)
    layers = len(find_layers(capture(digits_model.module, digits_model.spec.input)))
    largest = {}
    for half_range in (False, True):
        path = quantize_openvino(source, tmp_path / f"{half_range}.xml", calibration, half_range=half_range)
        weights = [
            node.data
            for node in openvino.Core().read_model(path).get_ops()
            if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8
        ]
        assert len(weights) >= layers - 2
        largest[half_range] = max(int(np.abs(values.astype(int)).max()) for values in weights)
    # 255 · 64 · 2 = 32640 fits in 16 bits.
    assert largest[False] >= 127 and largest[True] <= 64


INT8 = Candidate("onnxruntime", "int8", saturation=Clipping("narrow", 128, narrowed=9, layers=3, clipping=4))


def test_losses_that_were_predicted_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, VNNI)
    given = Clipping("none", 128, clipping=5, severe=1)
    same = [replace(INT8, saturation=given), replace(INT8, engine="openvino", saturation=given)]
    failed = replace(INT8, precision="int8-asymmetric", error="could not be built")
    first, second, times = instruction_warnings(target(AVX2), [INT8, *same, failed])
    assert (
        first.startswith("onnxruntime int8: ")
        and "9 channels in 3 layers got wider steps, and 4 still" in first
    )
    assert "badly" not in first
    assert second.startswith("onnxruntime int8, openvino int8: ")
    assert "it came in quantized, and 5 channels clip, 1 of them badly" in second
    assert times.startswith("Times were measured on a machine with avx512_vnni")


@pytest.mark.parametrize(
    ("own", "device", "words"),
    [
        (
            AVX2,
            VNNI,
            ["accuracies of int8 were measured on kernels that clip", "without avx512_vnni, avx512_bf16"],
        ),
        (VNNI, ("asimd",), [f"with {', '.join(VNNI)} and without asimd"]),
        ((), ("asimd",), ["whose system does not tell"]),
        (VNNI, VNNI, []),
        (VNNI, None, []),
        (AVX2, None, []),
    ],
)
def test_other_differences(
    monkeypatch: pytest.MonkeyPatch, own: tuple[str, ...], device: tuple[str, ...] | None, words: list[str]
) -> None:
    set_machine(monkeypatch, own)
    found = instruction_warnings(target(device), [replace(INT8, saturation=None)])
    assert len(found) == len(words)
    assert all(part in warning for part, warning in zip(words, found, strict=True))


def test_the_onnx_file_of_a_quantized_model_is_no_float_file() -> None:
    from cveff.export.deploy_manifest import _alternatives

    given = Candidate("onnxruntime", "int8", file="model.onnx", saturation=Clipping("none", 8, severe=2))
    (entry,) = _alternatives([given, Candidate("openvino", "int8", chosen=True)], threads=1)
    assert (entry["precision"], entry["saturation"]["severe"]) == ("int8", 2)
    assert _alternatives([replace(given, chosen=True)], threads=1) == []
