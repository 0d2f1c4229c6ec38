"""Rounding with compensation: on the grid, never worse in the layers' own measure, and without a mean error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from cveff.errors import ExportError
from cveff.export.onnx import export
from cveff.export.rounding import LEVELS, _compensated, _Layer, round_weights
from cveff.model import Model, ModelSpec
from cveff.runtime.engines import open_file
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(12, 12), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Full, strided, depthwise and grouped convolutions, and a linear layer, with uneven weights."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False),
        nn.ReLU6(),
        nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(torch.exp(torch.randn_like(parameter)))
    labels = tuple("abcde")
    model = Model(ModelSpec("resnet18", {"num_classes": 5}, SPEC, labels=labels), module.eval())
    return export(model, tmp_path / "model.onnx")


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 12, 12, 3), np.uint8)


def _weights(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path).graph
    constants = {item.name: numpy_helper.to_array(item).astype(np.float64) for item in graph.initializer}
    return {n.input[1]: constants[n.input[1]] for n in graph.node if n.op_type in ("Conv", "Gemm")}


def _logits(path: Path, images: np.ndarray) -> np.ndarray:
    with open_file("onnxruntime", path, threads=1) as session:
        return session(images)


def _nearest(path: Path, destination: Path) -> Path:
    """Each weight to the nearest point of its channel's grid."""
    proto = onnx.load(path)
    for item in proto.graph.initializer:
        if item.name in _weights(path):
            weight = numpy_helper.to_array(item)
            scale = (
                np.abs(weight).reshape(len(weight), -1).max(1).reshape(-1, *[1] * (weight.ndim - 1)) / LEVELS
            )
            item.CopyFrom(
                numpy_helper.from_array((np.round(weight / scale) * scale).astype(np.float32), item.name)
            )
    onnx.save(proto, destination)
    return destination


def test_every_weight_lies_on_the_grid_its_channel_had(
    exported: Path, images: np.ndarray, tmp_path: Path
) -> None:
    rounded = _weights(round_weights(exported, tmp_path / "rounded.onnx", images))
    before = _weights(exported)
    assert rounded.keys() == before.keys() and len(rounded) == 5
    for name, weight in rounded.items():
        largest = np.abs(weight).reshape(len(weight), -1).max(1)
        # A quantizer makes its scale from the largest weight: were that another, it would round once more.
        assert np.array_equal(largest, np.abs(before[name]).reshape(len(weight), -1).max(1))
        steps = weight.reshape(len(weight), -1) / (largest[:, None] / LEVELS)
        assert np.abs(steps - np.round(steps)).max() < 1e-4


def test_logits_are_nearer_than_with_rounding_to_the_nearest(
    exported: Path, images: np.ndarray, tmp_path: Path
) -> None:
    fresh = np.random.default_rng(1).integers(0, 256, (32, 12, 12, 3), np.uint8)
    truth = _logits(exported, fresh)
    ours = _logits(round_weights(exported, tmp_path / "rounded.onnx", images), fresh)
    nearest = _logits(_nearest(exported, tmp_path / "nearest.onnx"), fresh)
    assert np.square(ours - truth).mean() < 0.5 * np.square(nearest - truth).mean()


def test_what_is_on_the_grid_stays(exported: Path, images: np.ndarray, tmp_path: Path) -> None:
    once = round_weights(exported, tmp_path / "once.onnx", images)
    twice = round_weights(once, tmp_path / "twice.onnx", images)
    for name, weight in _weights(once).items():
        np.testing.assert_allclose(_weights(twice)[name], weight, rtol=1e-5, atol=1e-9)


def test_the_same_images_give_the_same_bytes(exported: Path, images: np.ndarray, tmp_path: Path) -> None:
    first = round_weights(exported, tmp_path / "a.onnx", images)
    second = round_weights(exported, tmp_path / "b.onnx", images)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("seed", range(5))
def test_compensation_lowers_the_error_of_the_output(seed: int) -> None:
    generator = np.random.default_rng(seed)
    samples = generator.normal(size=(2, 200, 12)) @ generator.normal(size=(2, 12, 12)) + 1
    moments = samples.transpose(0, 2, 1) @ samples / 200
    weight = generator.normal(size=(2, 6, 12))
    scale = np.abs(weight).max(2, keepdims=True) / 7  # a coarse grid, so that errors are large
    ours = _compensated(weight, scale, moments)
    nearest = np.round(weight / scale) * scale

    def error(rounded: np.ndarray) -> float:
        difference = rounded - weight
        return float(np.einsum("goi,gij,goj->", difference, moments, difference))

    assert error(ours) < error(nearest)


def test_independent_inputs_are_rounded_to_the_nearest() -> None:
    """With nothing to make an error up with, compensation is plain rounding."""
    weight = np.random.default_rng(0).normal(size=(1, 4, 9))
    scale = np.abs(weight).max(2, keepdims=True) / LEVELS
    rounded = _compensated(weight, scale, np.eye(9)[None])
    np.testing.assert_allclose(rounded, np.round(weight / scale) * scale, rtol=0, atol=1e-12)


def test_zeros_stay_zeros_while_the_others_make_up_for_each_other() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(1, 6, 32))
    weight[random.random(weight.shape) < 0.5] = 0
    x = random.normal(size=(1, 200, 32)) @ random.normal(size=(1, 32, 32))
    scale = np.abs(weight).max(axis=2, keepdims=True) / LEVELS
    rounded = _compensated(weight, scale, x.transpose(0, 2, 1) @ x / 200)
    assert not rounded[weight == 0].any()
    nearest = np.round(weight / scale) * scale
    error, plain = (np.square(x @ (found - weight).transpose(0, 2, 1)).mean() for found in (rounded, nearest))
    assert error < plain


def test_mean_error_is_what_the_bias_must_lose() -> None:
    node = onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    weight = np.random.default_rng(0).normal(size=(1, 3, 4))
    layer = _Layer(node, weight, (3, 4), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), True)
    x = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32) + 2
    layer.observe(x, np.random.default_rng(0))
    rounded = layer.rounded()
    error = x.astype(np.float64) @ (rounded - weight)[0].T
    np.testing.assert_allclose(layer.mean_error(rounded), error.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 12, 12, 3), (4, 10, 12, 3)])
def test_bad_calibration_is_refused_before_anything_is_written(
    exported: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ExportError, match="calibration"):
        round_weights(exported, tmp_path / "rounded.onnx", np.zeros(shape, np.uint8))
    assert not (tmp_path / "rounded.onnx").exists()
