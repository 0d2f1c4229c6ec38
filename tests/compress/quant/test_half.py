"""Networks in 16 bits: where conversions are, what stays in float32 and why, and what files and checkpoints say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import cveff
from cveff.compress.quant.capture import aten, capture, identify, operator_name
from cveff.compress.quant.half import DTYPES, HalfGraph, cast, to_half
from cveff.compress.quant.half_ranges import LARGEST, MARGIN
from cveff.compress.quant.network import is_cast
from cveff.errors import CheckpointError, StepError
from cveff.export.onnx import export
from cveff.export.trt_check import check_tensorrt
from cveff.model import Model, with_module
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(8, 8), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


class Net(nn.Module):
    """Convolution, something between, convolution, mean, classifier."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3)
        self.fc = nn.Linear(6, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.norm(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


def images(count: int = 16, seed: int = 1) -> list[Tensor]:
    return [torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))]


def types(graph: torch.fx.GraphModule) -> dict[str, torch.dtype]:
    """Operator -> type of its result when the network runs."""
    found: dict[str, torch.dtype] = {}
    names = {node: name for name, node in identify(graph).items()}

    class Look(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, Tensor) and n in names:
                found[names[n]] = result.dtype
            return result

    Look(graph).run(*images(2))
    return found


@pytest.fixture(scope="module", params=["resnet", "vit"])
def model(request: pytest.FixtureRequest) -> Model:
    """Two tiny families with random weights."""
    torch.manual_seed(0)
    if request.param == "resnet":
        return cveff.create("small_resnet_s", 10, image_size=16)
    return cveff.create(
        "vit_tiny_patch16_224",
        10,
        image_size=16,
        timm_arguments={"patch_size": 4, "depth": 2, "embed_dim": 48},
    )


def calibration(model: Model) -> list[Tensor]:
    size = (8, model.spec.input.channels, *model.spec.input.size)
    return [torch.randn(size, generator=torch.Generator().manual_seed(2))]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_close_to_float32_saved_bit_equal_and_exported_in_half_the_bytes(
    model: Model, precision: str, tmp_path: Path
) -> None:
    model.module.eval()
    batches = calibration(model)
    found = to_half(model.module, model.spec.input, batches, precision)
    with torch.no_grad():
        exact, ours = model.module(batches[0]), found.graph(batches[0])
    assert ours.dtype is torch.float32
    allowed = {"fp16": 3e-3, "bf16": 3e-2}[precision]
    error = (ours - exact).abs().max() / exact.abs().max()
    assert 1e-6 < error < allowed  # it is rounded, and not by much
    half = with_module(model, found.graph, found.edit)
    cveff.save(half, tmp_path / "model")
    loaded = cveff.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded.module(batches[0]), ours)
    size = (tmp_path / "model" / "weights.safetensors").stat().st_size
    assert size < 2.2 * model.num_parameters + 20_000
    path = export(half, tmp_path / "model.onnx")  # compares the file's logits with PyTorch's
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert check_tensorrt(proto) == []
    assert proto.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert proto.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    weights = sum(len(item.raw_data) for item in proto.graph.initializer)
    assert weights < 2.1 * model.num_parameters + 2000
    casts = sum(node.op_type == "Cast" for node in proto.graph.node)
    assert casts <= found.casts + 1  # the pixels'


def test_a_convolutional_network_converts_at_its_ends_and_around_the_mean_alone() -> None:
    found = to_half(Net().eval(), SPEC, images())
    # Images down, the mean up, its result down (to a layer of 6 values), logits up.
    assert found.casts == 4
    kinds = types(found.graph)
    assert kinds["conv1:conv2d:0"] is kinds[":relu:0"] is torch.float16
    assert kinds[":mean:0"] is torch.float32
    assert all(value.dtype is torch.float16 for value in found.graph.state_dict().values())


def test_norms_and_softmax_stay_in_float32() -> None:
    vit = cveff.create("vit_tiny_patch16_224", 5, image_size=16, timm_arguments={"depth": 1, "embed_dim": 48})
    graph = to_half(vit.module.eval(), vit.spec.input, [torch.randn(2, 3, 16, 16)]).graph
    wide = {
        operator_name(node)
        for node in graph.graph.nodes
        if "val" in node.meta and _type(node) is torch.float32
    }
    assert {"layer_norm", "softmax"} <= wide

    class Look(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            name = operator_name(n) if n.op == "call_function" else ""
            if name in ("layer_norm", "softmax"):
                assert isinstance(result, Tensor) and result.dtype is torch.float32
                seen.add(name)
            if name in ("linear", "matmul"):
                assert isinstance(result, Tensor) and result.dtype is torch.float16
                seen.add(name)
            return result

    seen: set[str] = set()
    Look(graph).run(torch.randn(2, 3, 16, 16))
    assert seen == {"layer_norm", "softmax", "linear", "matmul"}


def _type(node: torch.fx.Node) -> torch.dtype | None:
    value = node.meta["val"]
    return value.dtype if isinstance(value, Tensor) else None


def test_a_cheap_operator_between_float32_operators_stays_with_them() -> None:
    """Two conversions around the three, not four."""

    def between(x: Tensor) -> Tensor:
        return torch.exp(torch.relu(torch.exp(x)) * -1)

    found = to_half(Net(between).eval(), SPEC, images())
    assert types(found.graph)[":relu:0"] is torch.float32
    assert found.casts == 4 + 2


def test_overflow_is_found_and_the_operators_are_named_with_their_range() -> None:
    def between(x: Tensor) -> Tensor:
        return torch.relu(x * 1e4) * 1e-4

    net = Net(between).eval()
    found = to_half(net, SPEC, images())
    names = {item.operator: item for item in found.kept}
    assert {":mul:0", ":relu:0", ":mul:1"} <= names.keys()
    assert names[":mul:0"].reach > LARGEST / MARGIN
    assert "its result reaches" in names[":mul:0"].reason
    assert "conv1:conv2d:0" not in names
    with torch.no_grad():
        exact, ours = net(images(seed=3)[0]), found.graph(images(seed=3)[0])
    assert (ours - exact).abs().max() / exact.abs().max() < 5e-3
    assert to_half(net, SPEC, images(), "bf16").kept == ()


def test_values_below_float16s_normal_numbers_are_found() -> None:
    def between(x: Tensor) -> Tensor:
        return torch.relu(x * 1e-6) * 1e6

    net = Net(between).eval()
    found = to_half(net, SPEC, images())
    assert any("below float16's normal numbers" in item.reason for item in found.kept)
    with torch.no_grad():
        exact, ours = net(images()[0]), found.graph(images()[0])
    assert (ours - exact).abs().max() / exact.abs().max() < 5e-3


def test_a_weight_too_large_for_float16_keeps_its_operator_in_float32() -> None:
    net = Net().eval()
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] = 1e5
    found = to_half(net, SPEC, images())
    (kept,) = [item for item in found.kept if item.operator == "conv2:conv2d:0"]
    assert "parameter conv2.weight reaches 1e+05" in kept.reason
    assert found.graph.get_parameter("conv2.weight").dtype is torch.float32
    edit = HalfGraph(
        SPEC.to_json(), "fp16", tuple(name for name in found.edit.float32 if not name.startswith("conv2"))
    )
    with pytest.raises(StepError, match=r"parameter conv2.weight reaches 1e\+05"):
        edit.apply(net)


def test_a_batch_norm_that_no_convolution_takes_in_is_a_multiplication_and_an_addition() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.net = nn.BatchNorm2d(3), Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(torch.relu(self.norm(x)))

    net = First().eval()
    with torch.no_grad():
        net.norm.running_var.fill_(1e-9)  # float16 has no such number
        net.norm.weight.fill_(1e-3)
        net.norm.bias.normal_()
    found = to_half(net, SPEC, images())
    assert not any(node.target is aten.batch_norm.default for node in found.graph.graph.nodes)
    with torch.no_grad():
        exact, ours = net(images()[0]), found.graph(images()[0])
    assert (ours - exact).abs().max() / exact.abs().max() < 5e-3
    rebuilt = found.edit.apply(First())
    rebuilt.load_state_dict(found.graph.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(images()[0]), ours)


def test_excluded_operators_stay_in_float32() -> None:
    found = to_half(Net().eval(), SPEC, images(), exclude=("conv2:conv2d:0",))
    assert types(found.graph)["conv2:conv2d:0"] is torch.float32
    assert found.asked == ("conv2:conv2d:0",)
    assert found.graph.get_parameter("conv2.weight").dtype is torch.float32


def test_float16_products_are_those_of_float16_inputs_rounded_once() -> None:
    graph = to_half(Net().eval(), SPEC, images()).graph
    node = next(node for node in graph.graph.nodes if operator_name(node) == "conv2d")
    x, weight = torch.randn(2, 8, 8, 8).half(), torch.randn(6, 8, 3, 3).half()
    expected = torch.conv2d(x.double(), weight.double()).half()
    ours = node.target(x, weight, None, [1, 1], [0, 0])
    assert ours.dtype is torch.float16
    assert (ours != expected).float().mean() < 5e-3  # ties that float32's sum decides otherwise


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda net: net.conv2.weight.fill_(float("nan")), "parameter conv2.weight holds NaN or infinity"),
        (lambda net: net.conv1.weight.fill_(1e38), "computes NaN or infinity on calibration images"),
    ],
)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_values_that_are_not_finite_are_named(
    damage: Callable[[Net], object], message: str, precision: str
) -> None:
    net = Net(lambda x: x * 1e10).eval()
    with torch.no_grad():
        damage(net)
    with pytest.raises(StepError, match=message):
        to_half(net, SPEC, images(), precision)


def test_nothing_left_in_16_bits_is_refused_with_the_reason() -> None:
    net = Net().eval()
    with torch.no_grad():
        for layer in (net.conv1, net.conv2, net.fc):
            layer.weight.view(-1)[0] = 1e5
    with pytest.raises(StepError, match=r"no layer is left.*conv1.weight reaches"):
        to_half(net, SPEC, images())


def test_unknown_or_unfit_requests_are_refused() -> None:
    net = Net().eval()
    with pytest.raises(StepError, match="'fp12' is unknown"):
        to_half(net, SPEC, images(), "fp12")
    with pytest.raises(StepError, match="'nowhere' is no operator"):
        to_half(net, SPEC, images(), exclude=("nowhere",))
    for empty in ([], [torch.zeros(0, 3, 8, 8)]):
        with pytest.raises(StepError, match="no calibration images"):
            to_half(net, SPEC, empty)
    done = to_half(net, SPEC, images())
    assert is_cast(done.graph) and not is_cast(net)
    with pytest.raises(StepError, match="in 16 bits already"):
        to_half(done.graph, SPEC, images())
    with pytest.raises(CheckpointError, match="'fp12' is unknown"):
        HalfGraph(SPEC.to_json(), "fp12").apply(net)
    with pytest.raises(CheckpointError, match="no operator 'elsewhere'"):
        HalfGraph(SPEC.to_json(), "fp16", ("elsewhere",)).apply(net)


def test_the_network_given_is_left_as_it_was() -> None:
    net = Net().eval()
    before = copy.deepcopy(net.state_dict())
    to_half(net, SPEC, images())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_constant_read_in_both_types_is_stored_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.gain = Net(), nn.Parameter(torch.rand(8, 1, 1) + 0.5)
            self.net.between = self.between

        def between(self, x: Tensor) -> Tensor:
            return torch.exp(-torch.exp(x) * self.gain).mul(self.gain)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    net = Shared().eval()
    found = to_half(net, SPEC, images())
    assert [name for name in found.graph.state_dict() if "gain" in name] == ["gain"]
    with torch.no_grad():
        exact, ours = net(images()[0]), found.graph(images()[0])
    assert (ours - exact).abs().max() / exact.abs().max() < 5e-3


@pytest.mark.parametrize("exclude", [(), ("conv1:conv2d:0",)])
def test_images_in_16_bits_are_taken_too(exclude: tuple[str, ...]) -> None:
    """Evaluation gives images in the type of the first parameter."""
    graph = to_half(Net().eval(), SPEC, images(), exclude=exclude).graph
    rounded = images()[0].half()
    with torch.no_grad():
        assert torch.equal(graph(rounded), graph(rounded.float()))


def test_casting_everything_or_nothing() -> None:
    graph = capture(Net().eval(), SPEC)
    assert cast(graph, (), DTYPES["fp16"]) == 0
    assert not is_cast(graph)
