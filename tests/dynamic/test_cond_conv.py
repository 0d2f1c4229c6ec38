"""Laws of dynamic convolution: the plain network at the start, one image at a time, timm's, and the exported file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from timm.layers import CondConv2d as TimmCondConv2d
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional as F

import cveff
from cveff.compress import Distill, Prune
from cveff.data import Data
from cveff.data import load as load_data
from cveff.dynamic import CondConv, ConditionalConvolutions
from cveff.dynamic.cond_conv_layer import CondConv2d
from cveff.edits import edit_from_json, edit_to_json
from cveff.errors import CveffError, StepError
from cveff.export.normalize import deployable
from cveff.model import Model
from cveff.recipe import parse_recipe
from cveff.runtime.engines import open_file
from cveff.runtime.input_spec import InputSpec
from cveff.train import Train

INPUT = InputSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.35,))
TRAIN = Train(epochs=2, batch_size=64, learning_rate=0.05, precision="fp32", warmup_epochs=0)
# Dense; grouped with a stride; depthwise; depthwise with several outputs a channel; pointwise with a stride;
# TensorFlow's padding; a long kernel with holes.
SHAPES: dict[str, nn.Conv2d] = {
    "dense": nn.Conv2d(6, 10, 3, padding=1),
    "grouped": nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2, bias=False),
    "depthwise": nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6),
    "multiplied": nn.Conv2d(6, 12, 3, padding=1, groups=6),
    "pointwise": nn.Conv2d(6, 5, 1, stride=2),
    "same": Conv2dSame(6, 5, 3, stride=2),
    "long": nn.Conv2d(6, 5, (1, 5), padding=(0, 3), dilation=(1, 2)),
}


def mixing(convolution: nn.Conv2d, experts: int = 3) -> CondConv2d:
    """A layer whose experts and routing differ, in float64."""
    layer = CondConv2d(convolution, experts).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer


def pixels(count: int, size: tuple[int, int] = (9, 12)) -> torch.Tensor:
    return torch.randn(count, 6, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits", seed=0)


def tiny(digits: Data) -> Model:
    torch.manual_seed(0)
    return cveff.create("small_resnet_s", labels=digits.labels, input=INPUT, widths=[8, 16], depths=[1, 1])


def logits(model: Model, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module.eval()(x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_is_its_images_one_by_one(shape: str, count: int) -> None:
    plain, x = SHAPES[shape], pixels(count)
    layer = mixing(plain)
    with torch.no_grad():
        found = layer(x)
        shares = torch.sigmoid(layer.routing(x.mean((2, 3))))
        for index in range(count):
            weight = sum(share * expert for share, expert in zip(shares[index], layer.weight, strict=True))
            weight = weight.reshape(plain.weight.shape)
            bias = None if layer.bias is None else shares[index] @ layer.bias
            image = x[index : index + 1]
            if shape == "same":  # TensorFlow's: 9 rows to 5 and 12 columns to 6 by strides of 2
                image = F.pad(image, (0, 1, 1, 1))
            expected = F.conv2d(
                image, weight, bias, plain.stride, plain.padding, plain.dilation, plain.groups
            )
            # float64: the same sums, in another order
            torch.testing.assert_close(found[index : index + 1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_matrices_are_the_convolution(shape: str) -> None:
    layer, x = mixing(SHAPES[shape]), pixels(3)
    with torch.no_grad():
        expected = layer(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_exporting", lambda: True)
            torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", ["dense", "grouped", "depthwise"])
def test_given_the_shares_it_is_timms(shape: str) -> None:
    plain, x = SHAPES[shape], pixels(3)
    layer = mixing(plain)
    peer = TimmCondConv2d(
        plain.in_channels,
        plain.out_channels,
        plain.kernel_size[0],
        plain.stride[0],
        plain.padding[0],
        groups=plain.groups,
        bias=plain.bias is not None,
        num_experts=3,
    ).double()
    with torch.no_grad():
        peer.weight.copy_(layer.weight.flatten(1))
        if layer.bias is not None:
            peer.bias.copy_(layer.bias)
        expected = peer(x, torch.sigmoid(layer.routing(x.mean((2, 3)))))
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "architecture", ["small_resnet_s", "test_efficientnet", "tf_efficientnet_lite0", "test_convnext"]
)
@pytest.mark.parametrize("experts", [2, 5])
def test_the_network_answers_as_before_until_it_is_trained(architecture: str, experts: int) -> None:
    torch.manual_seed(0)
    model = cveff.create(architecture, num_classes=4, image_size=64)
    mixed = cveff.apply(model, CondConv(experts))
    layers = mixed.spec.edits[-1].layers  # type: ignore[attr-defined]
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for each in (model, mixed):
        each.module.double()
    torch.testing.assert_close(
        logits(mixed, x), logits(model, x), rtol=1e-5, atol=1e-6
    )  # kernels are float32
    for path in layers:
        weight = mixed.module.get_submodule(path).get_parameter("weight")
        assert len(weight) == experts and not torch.equal(weight[0], weight[1])
    convolutions = [part for part in mixed.module.modules() if isinstance(part, (nn.Conv2d, CondConv2d))]
    assert isinstance(convolutions[-1], (CondConv2d, nn.Conv2d)) and not isinstance(
        convolutions[0], CondConv2d
    )


def test_squeeze_and_excitation_is_left_alone() -> None:
    model = cveff.apply(cveff.create("test_efficientnet", num_classes=4, image_size=64), CondConv())
    assert not [path for path in model.spec.edits[-1].layers if ".se." in path]  # type: ignore[attr-defined]


def test_a_loaded_model_is_bit_equal(digits: Data, tmp_path: Path) -> None:
    model = cveff.apply(tiny(digits), CondConv(at=("stages.1.*",)))
    edit = model.spec.edits[-1]
    assert edit_from_json(edit_to_json(edit)) == edit
    cveff.save(model, tmp_path / "model")
    loaded = cveff.load(tmp_path / "model")
    assert loaded.spec == model.spec
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(logits(loaded, x), logits(model, x))


def test_training_teaches_routing_and_tells_experts_apart(digits: Data, tmp_path: Path) -> None:
    dense = cveff.apply(tiny(digits), TRAIN, data=digits)
    model = cveff.apply(dense, CondConv(recover=Distill(alpha=0.5, train=TRAIN)), data=digits)
    x = torch.randn(8, 1, 8, 8)
    for path in model.spec.edits[-1].layers:  # type: ignore[attr-defined]
        layer = model.module.get_submodule(path)
        assert isinstance(layer, CondConv2d)
        shares = layer.routing(torch.randn(8, layer.in_channels)).sigmoid()
        assert shares.std(0).min() > 0  # of different images, different ones
        assert shares.std(1).min() > 0  # and of different experts
    assert not torch.equal(logits(model, x), logits(dense, x))
    path = cveff.export(model, tmp_path / "model.onnx")
    assert_agrees(path, model, (1, 3))


def test_the_file_takes_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = cveff.create("test_efficientnet", num_classes=4, image_size=(64, 48))
    model = cveff.apply(plain, CondConv(experts=3))
    torch.manual_seed(0)
    with torch.no_grad():
        for part in model.module.modules():
            if isinstance(part, CondConv2d):
                part.routing.weight.normal_(std=part.in_channels**-0.5)
    path = cveff.export(model, tmp_path / "model.onnx")
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert not operators & {"Loop", "If", "NonZero", "Scan"}
    assert_agrees(path, model, (1, 3))


def assert_agrees(path: Path, model: Model, batches: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    spec, network = model.spec.input, deployable(model.module, model.spec.input)
    with open_file("onnxruntime", path, threads=1) as session:
        for batch in batches:
            images = random.integers(0, 256, (batch, *spec.size, spec.channels), np.uint8)
            with torch.no_grad():
                expected = network(torch.from_numpy(images)).numpy()
            # The bar of `cveff.export`'s own check: float32 sums in another order.
            np.testing.assert_allclose(
                session(images), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()
            )


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"experts": 1}, "experts is 1; give 2 or more"),
        ({"spread": 0.0}, "equal experts stay equal"),
        ({"recover": Distill(alpha=0.0, train=Train(epochs=0))}, "epochs is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StepError, match=words):
        CondConv(**settings)


def test_layers_that_cannot_be_replaced_are_named(digits: Data) -> None:
    with pytest.raises(StepError, match=r"'head\.\*' is no convolution; there are stem\.conv"):
        cveff.apply(tiny(digits), CondConv(at=("head.*",)))
    nfnet = cveff.create("test_nfnet", num_classes=4)
    with pytest.raises(StepError, match=r"is a ScaledStdConv2d.*, not a plain Conv2d; leave it out"):
        cveff.apply(nfnet, CondConv(at=("stages.*",)))
    with pytest.raises(StepError, match="test_nfnet has no convolution that"):
        cveff.apply(nfnet, CondConv())
    with pytest.raises(StepError, match="apply Reparameterize first"):
        cveff.apply(cveff.create("mobileone_s0", num_classes=3, image_size=32), CondConv())
    with pytest.raises(StepError, match="needs data"):
        cveff.apply(tiny(digits), CondConv(recover=Distill(train=TRAIN)))
    with pytest.raises(StepError, match=r"layer 'nothing' "):
        ConditionalConvolutions(("nothing",), 4).apply(tiny(digits).module)
    with pytest.raises(StepError, match="is a Linear, not a plain"):
        ConditionalConvolutions(("fc",), 4).apply(tiny(digits).module)
    with pytest.raises(StepError, match="1 experts cannot be mixed"):
        ConditionalConvolutions(("stem.conv",), 1).apply(tiny(digits).module)
    for padding in ({"padding": "same"}, {"padding_mode": "reflect", "padding": 1}):
        with pytest.raises(StepError, match="pad"):
            CondConv2d(nn.Conv2d(2, 2, 3, **padding), 2)


def test_pruning_comes_before(digits: Data) -> None:
    with pytest.raises(CveffError):
        cveff.apply(cveff.apply(tiny(digits), CondConv(at=("*",))), Prune(ratio=0.5, recover=None))


def test_a_recipe_mixes_kernels() -> None:
    values = {
        "data": {"source": "digits"},
        "train": {},
        "steps": [{"kind": "cond_conv", "experts": 2, "at": ["stages.1.*"]}],
    }
    recipe = parse_recipe(values)
    assert recipe.steps == (CondConv(experts=2, at=("stages.1.*",)),)
    assert parse_recipe(recipe.to_json()) == recipe
