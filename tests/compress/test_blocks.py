"""`blocks` and `macs`: what engines fuse is one block, operations are counted exactly, also before pruning is done."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cveff
from cveff.compress.analysis import analyze
from cveff.compress.blocks import blocks, macs
from cveff.compress.trace import trace
from cveff.measure.block import Block
from cveff.measure.block_engines import measure_block
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(32, 32), channels=3)


def of(module: nn.Module, spec: InputSpec = SPEC) -> list[Block]:
    return blocks(trace(module.eval(), spec))


def kinds(found: list[Block]) -> dict[str, int]:
    return dict(Counter(block.kind for block in found))


def conv_norm(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


@pytest.mark.parametrize(
    ("name", "billions"), [("resnet18", 1.814), ("mobilenetv2_100", 0.3008), ("vit_tiny_patch16_224", 1.2537)]
)
def test_macs_at_224_are_the_known_figures(name: str, billions: float) -> None:
    model = cveff.create(name)
    assert macs(trace(model.module, model.spec.input)) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("regnety_002", 64),
        ("convnext_atto", 64),
        ("swin_tiny_patch4_window7_224", 224),
        ("edgenext_xx_small", 64),
    ],
)
def test_macs_are_half_of_what_torch_counts_as_flops(name: str, size: int) -> None:
    model = cveff.create(name, image_size=size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.module.eval()(torch.zeros(1, 3, size, size))
    traced = trace(model.module, model.spec.input)
    assert 2 * macs(traced) == counter.get_total_flops()
    assert blocks(traced)


def test_a_convolution_takes_its_norm_residual_and_activation_along() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(*conv_norm(3, 16, 2), nn.ReLU())
            self.one = nn.Sequential(*conv_norm(16, 16), nn.ReLU6())
            self.two = nn.Sequential(*conv_norm(16, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return torch.relu(self.two(self.one(x)) + x)

    found = of(Residual())
    assert kinds(found) == {"input": 1, "conv": 3, "reorder": 1}
    plane = (1, 16, 16, 16)
    assert found[1] == Block("conv", ((1, 3, 32, 32),), (16, 3, 3, 3), (2, 2), (1, 1), 1, "relu")
    assert found[2] == Block("conv", (plane,), (16, 16, 3, 3), (1, 1), (1, 1), 1, "relu6")
    assert found[3] == Block("conv", (plane, plane), (16, 16, 3, 3), (1, 1), (1, 1), 1, "relu")


def test_a_value_used_twice_is_not_fused_away() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return torch.sigmoid(x) * x

    found = of(Twice())
    assert [block.op for block in found if block.kind == "elementwise"] == ["sigmoid", "mul"]
    assert next(block for block in found if block.kind == "conv").activation == ""


def test_a_gate_is_pooled_and_multiplied_in_the_usual_layout() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.gate = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1)
            self.last = nn.Conv2d(32, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.last(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())

    found = of(Gate())
    assert kinds(found) == {"input": 1, "conv": 3, "pool": 1, "elementwise": 1, "reorder": 5}
    product = next(block for block in found if block.kind == "elementwise")
    assert product.inputs == ((1, 32, 32, 32), (1, 32, 1, 1))


def test_attention_is_two_products_and_a_softmax() -> None:
    found = of(cveff.create("vit_tiny_patch16_224", image_size=32).module)
    assert kinds(found)["matmul"] == 24
    assert kinds(found)["softmax"] == 12
    first = next(block for block in found if block.kind == "matmul")
    assert first.inputs == ((1, 3, 5, 64), (1, 3, 64, 5))
    assert Block("linear", ((1, 5, 192),), (768, 192), activation="gelu") in found


def test_constant_scales_and_full_slices_cost_nothing() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gamma = nn.Linear(32, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.linear(x) * self.gamma.view(1, 1, 1, -1).abs())[..., :8].reshape(1, -1)

    assert kinds(of(Scaled())) == {"input": 1, "linear": 1}


def test_an_unknown_operator_is_a_copy_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cummax(torch.logsumexp(x, 1), 1)[0]

    with caplog.at_level(logging.WARNING):
        found = of(Sorted())
    assert Block("move", ((1, 32, 32),), op="copy") in found
    assert "the time of logsumexp is guessed as that of a copy" in caplog.text


@pytest.mark.parametrize(
    "name",
    ["small_resnet_s", "mobilenetv3_small_050", "vit_tiny_patch16_224", "regnety_002", "convnext_atto"],
)
def test_a_pruned_network_is_known_before_it_is_built(name: str) -> None:
    model = cveff.create(name, num_classes=8, image_size=32)
    model.module.eval()
    analysis = analyze(model.module, model.spec.input)
    random = np.random.default_rng(0)
    keep = {}
    for group in analysis.groups:
        keep[group.name] = np.arange(group.size) < max(1, int(group.size * random.uniform(0.3, 0.9)))
    shapes = analysis.shapes(keep)
    pruned = trace(analysis.edit(keep, model.module).apply(model.module), model.spec.input)
    assert macs(pruned) == macs(analysis.trace, shapes) < macs(analysis.trace)
    assert blocks(pruned) == blocks(analysis.trace, shapes)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilevitv2_050", "poolformerv2_s12"])
def test_every_block_of_a_network_can_be_measured(name: str) -> None:
    model = cveff.create(name, image_size=64)
    for block in dict.fromkeys(blocks(trace(model.module, model.spec.input))):
        if block.kind != "conv" or block.groups > 1:  # dense convolutions are alike, and take the time
            assert measure_block("onnxruntime", block, 1) >= 0
