"""float8's values, rounding as ONNX defines it, and networks rounded to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import cveff
from cveff.compress.quant.fake_quant import FakeQuantize, Grid
from cveff.compress.quant.float8 import to_float8
from cveff.compress.quant.float8_values import round_to_float8
from cveff.compress.quant.network import QuantizedGraph
from cveff.compress.samples import samples
from cveff.errors import StepError
from cveff.export.layer_check import compare_layers
from cveff.export.normalize import deployable
from cveff.export.onnx import example_images, export
from cveff.export.trt_check import check_tensorrt
from cveff.model import Model, with_module

ZOO = Path(__file__).parents[3] / "model_zoo" / "weights"
FLOAT8 = Grid(signed=True, symmetric=True, float8=True)


@pytest.fixture(scope="module")
def model() -> Model:
    return cveff.load(ZOO / "digits")


@pytest.fixture(scope="module")
def images(model: Model) -> list[torch.Tensor]:
    data = cveff.data.load("digits")
    assert data.train is not None
    return [batch for batch, _ in samples(data.train, model.spec.input, 64)]


def onnx_pair(x: np.ndarray, scale: float) -> onnx.ModelProto:
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(x.shape))],
        [
            helper.make_tensor("s", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("scale", [1.0, 0.0137, 3e-4])
@pytest.mark.parametrize("engine", ["reference", "onnxruntime"])
def test_rounds_as_onnx_does(scale: float, engine: str) -> None:
    codes = np.arange(256, dtype=np.uint8).view(helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN))
    values = np.unique(codes.astype(np.float32)[np.isfinite(codes.astype(np.float32))])
    ties = (values[1:] + values[:-1]) / 2
    spread = np.random.default_rng(0).normal(0, 100, 2000).astype(np.float32)
    x = (np.concatenate([values, ties, spread, [1e4, -1e4]]) * np.float32(scale)).astype(np.float32)
    rounding = FakeQuantize(FLOAT8)
    rounding.set_steps(torch.tensor(scale), torch.tensor(0.0))
    proto = onnx_pair(x, scale)
    if engine == "reference":
        (expected,) = ReferenceEvaluator(proto).run(None, {"x": x})
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        (expected,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(rounding(torch.from_numpy(x)).numpy(), expected)


def test_three_bits_of_mantissa_and_saturation() -> None:
    assert round_to_float8(torch.tensor([1.0, 1.06, 1.07, 448.0, 460.0, 1e9, -1e9, 2.0**-9, 2.0**-11])).tolist() == [
        1.0, 1.0, 1.125, 448.0, 448.0, 448.0, -448.0, 2.0**-9, 0.0,
    ]  # fmt: skip


def test_the_range_ends_at_the_largest_value() -> None:
    rounding = FakeQuantize(FLOAT8)
    rounding.set_range(torch.tensor(-3.0), torch.tensor(7.0))
    assert rounding.scale.item() == pytest.approx(7 / 448)
    assert rounding(torch.tensor([7.0])).item() == pytest.approx(7.0)
    x = torch.randn(1000)
    relative = ((rounding(x) - x).abs() / x.abs())[x.abs() > 7 / 448 * 2**-6]
    assert 0.05 < relative.max() <= 2.0**-4 + 1e-6


def test_gradients_pass_where_values_are_not_clipped() -> None:
    rounding = FakeQuantize(FLOAT8)
    x = torch.tensor([1.3, 500.0, -500.0, 0.0], requires_grad=True)
    rounding(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("fields", [{}, {"signed": True}, {"signed": True, "symmetric": True, "bits": 4}])
def test_float8_has_eight_bits_and_a_sign(fields: dict[str, bool]) -> None:
    with pytest.raises(StepError, match="float8 has 8 bits"):
        Grid(**fields, float8=True)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_network_keeps_its_answers_and_its_file_computes_what_is_simulated(
    model: Model, images: list[torch.Tensor], per_channel: bool, tmp_path: Path
) -> None:
    graph, placement = to_float8(model.module, model.spec.input, images, per_channel=per_channel)
    rounded = with_module(model, graph, QuantizedGraph.of(model.spec.input, placement))
    with torch.no_grad():
        exact, ours = model.module(images[0]), graph(images[0])
    assert (exact.argmax(1) == ours.argmax(1)).float().mean() > 0.96
    assert 1e-3 < (ours - exact).square().mean() / exact.square().mean() < 2e-2
    path = export(rounded, tmp_path / "model.onnx")  # compares layer by layer
    proto = onnx.load(path)
    assert check_tensorrt(proto) == []
    stored = [
        item for item in proto.graph.initializer if item.data_type == TensorProto.FLOAT8E4M3FN and item.dims
    ]
    assert sum(item.dims != [] and np.prod(item.dims) > 64 for item in stored) == len(placement.weights)
    scales = {
        len(numpy_helper.to_array(item).shape) for item in proto.graph.initializer if "w0.scale" in item.name
    }
    assert scales == {int(per_channel)}
    shown = example_images(4, model, seed=5)
    found = compare_layers(proto, deployable(graph, model.spec.input), shown)
    assert found.compared == len(placement.sites) and found.equal > 0.9999 and found.last < 1e-5
    (logits,) = ReferenceEvaluator(proto).run(None, {"images": shown})
    simulated = deployable(graph, model.spec.input)(torch.from_numpy(shown)).detach().numpy()
    assert np.abs(logits - simulated).max() < 0.05 * np.abs(simulated).max()
    cveff.save(rounded, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(cveff.load(tmp_path / "saved").module(images[0]), ours)


def test_unfit_requests_are_refused(model: Model, images: list[torch.Tensor]) -> None:
    spec = model.spec.input
    with pytest.raises(StepError, match="no calibration images"):
        to_float8(model.module, spec, [])
    with pytest.raises(StepError, match="'nowhere' is no operator"):
        to_float8(model.module, spec, images, exclude=("nowhere",))
    graph, _ = to_float8(model.module, spec, images)
    with pytest.raises(StepError, match="quantized already"):
        to_float8(graph, spec, images)
    with pytest.raises(StepError, match="16 bits already"):
        to_float8(torch.nn.Linear(2, 2).half(), spec, images)
    with pytest.raises(StepError, match="holds NaN or infinity"):
        to_float8(model.module, spec, [torch.full_like(images[0], torch.inf)])
