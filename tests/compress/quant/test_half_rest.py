"""8 bits for TensorRT with the rest in float16: the file's types, its integers, and what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

import cveff
from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.compress.quant.half_rest import LEAST_STEP, HalfRest, halve_rest
from cveff.compress.quant.network import is_cast
from cveff.compress.quantize import Quantize
from cveff.data import Data
from cveff.errors import CheckpointError, StepError
from cveff.export.onnx import export
from cveff.export.trt_check import check_tensorrt
from cveff.export.trt_graph import TrtGraph
from cveff.model import Model
from cveff.train import Train

ZOO = Path(__file__).parents[3] / "model_zoo" / "weights"


@pytest.fixture(scope="module")
def data() -> Data:
    return cveff.data.load("digits")


@pytest.fixture(scope="module")
def dense() -> Model:
    return cveff.load(ZOO / "digits")


def rounded(model: Model, data: Data, **settings: Any) -> Model:
    step = Quantize(**{"scheme": "tensorrt", "images": 64, "weights": "nearest", **settings})
    return cveff.apply(model, step, data=data)


def answers(model: Model, data: Data) -> torch.Tensor:
    from cveff.compress.samples import samples

    batches = samples(data.val, model.spec.input, 200)
    with torch.no_grad():
        return torch.cat([model.module(images) for images, _ in batches])


def integers(path: Path) -> dict[tuple[int, ...], list[np.ndarray]]:
    """The stored weights by shape."""
    found: dict[tuple[int, ...], list[np.ndarray]] = {}
    for item in onnx.load(path).graph.initializer:
        if item.data_type == TensorProto.INT8 and len(item.dims) > 1:
            found.setdefault(tuple(item.dims), []).append(numpy_helper.to_array(item))
    return found


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_file_is_in_float16_around_its_roundings(
    dense: Model, data: Data, precision: str, tmp_path: Path
) -> None:
    whole = rounded(dense, data, precision=precision)
    half = rounded(dense, data, precision=precision, rest="fp16")
    assert is_cast(half.module) and not is_cast(whole.module)
    exact, ours = answers(whole, data), answers(half, data)
    assert 1e-6 < float((ours - exact).abs().max() / exact.abs().max()) < 0.05
    assert float((ours.argmax(1) == exact.argmax(1)).float().mean()) >= 0.99
    export(whole, tmp_path / "whole.onnx")
    path = export(half, tmp_path / "half.onnx")  # compares every layer with the simulation
    proto = onnx.load(path)
    assert check_tensorrt(proto) == []
    types = TrtGraph(proto).types
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert convolutions
    for node in convolutions:
        assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}
    # No conversion is left beside a rounding: pixels and logits, and around the mean.
    assert sum(node.op_type == "Cast" for node in proto.graph.node) <= 4
    if precision == "int8":
        mine, theirs = integers(path), integers(tmp_path / "whole.onnx")
        assert mine.keys() == theirs.keys()
        for shape, found in mine.items():
            for one, other in zip(found, theirs[shape], strict=True):
                assert np.array_equal(one, other)


def test_the_file_answers_as_the_simulation_does(dense: Model, data: Data, tmp_path: Path) -> None:
    half = rounded(dense, data, rest="fp16")
    path = export(half, tmp_path / "half.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = next(iter(data.val.evaluation_batches(half.spec.input, 100)))[0]
    found = session.run(None, {"images": images})[0]
    from cveff.export.normalize import deployable

    with torch.inference_mode():
        expected = deployable(half.module, half.spec.input)(torch.from_numpy(images)).numpy()
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.99
    assert np.abs(found - expected).max() <= 0.1 * np.abs(expected).max()


def test_saved_and_loaded_bit_equal(dense: Model, data: Data, tmp_path: Path) -> None:
    half = rounded(dense, data, rest="fp16")
    cveff.save(half, tmp_path / "model")
    assert torch.equal(answers(cveff.load(tmp_path / "model"), data), answers(half, data))


def test_a_network_trained_with_its_roundings_gets_its_rest_in_float16_afterwards(
    dense: Model, data: Data, tmp_path: Path
) -> None:
    whole = rounded(dense, data)
    trained = cveff.apply(whole, Train(epochs=1, learning_rate=1e-4), data=data)
    half = cveff.apply(trained, Quantize(precision="fp16", images=64), data=data)
    assert [edit.kind for edit in half.spec.edits][-2:] == ["quantize", "half_rest"]
    same = answers(half, data).argmax(1) == answers(trained, data).argmax(1)
    assert float(same.float().mean()) >= 0.99
    assert check_tensorrt(export(half, tmp_path / "half.onnx")) == []
    cveff.save(half, tmp_path / "model")
    assert torch.equal(answers(cveff.load(tmp_path / "model"), data), answers(half, data))


def test_a_step_too_small_for_float16_grows_and_a_large_one_is_refused(dense: Model, data: Data) -> None:
    whole = rounded(dense, data)
    parts = [part for part in whole.module.modules() if isinstance(part, FakeQuantize)]
    weight = next(part for part in parts if part.axis is not None)
    images = [torch.zeros(2, whole.spec.input.channels, *whole.spec.input.size)]
    before = weight.scale.clone()
    weight.scale[0] = 1e-7
    done = halve_rest(whole.module, whole.spec.input, images)
    found = [
        part for part in done.graph.modules() if isinstance(part, FakeQuantize) and part.axis is not None
    ]
    assert min(float(part.scale.min()) for part in found) == LEAST_STEP
    weight.scale.copy_(before)
    parts[0].scale.fill_(1e6)
    with pytest.raises(StepError, match=r"step of 1e\+06 is more than float16 holds"):
        halve_rest(whole.module, whole.spec.input, images)
    parts[0].scale.fill_(1.0)


def test_what_has_no_rest_is_refused(dense: Model, data: Data) -> None:
    with pytest.raises(StepError, match="scheme='tensorrt'"):
        Quantize(rest="fp16")
    with pytest.raises(StepError, match="scheme='tensorrt'"):
        Quantize(precision="auto", scheme="tensorrt", rest="fp16")
    with pytest.raises(StepError, match=r"quantize\.rest is 'int4'"):
        Quantize(rest="int4", scheme="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(StepError, match="quantize it first"):
        HalfRest().apply(dense.module)
    half = rounded(dense, data, rest="fp16")
    with pytest.raises(StepError, match="16 bits already"):
        HalfRest().apply(half.module)
    with pytest.raises(StepError, match="quantized already"):
        cveff.apply(half, Quantize(precision="fp16"), data=data)
    cpu = rounded(dense, data, scheme="cpu")
    with pytest.raises(StepError, match="quantized already"):
        cveff.apply(cpu, Quantize(precision="fp16"), data=data)
    whole = rounded(dense, data)
    with pytest.raises(CheckpointError, match="no operator 'nothing:conv2d:0'"):
        HalfRest(("nothing:conv2d:0",)).apply(whole.module)
