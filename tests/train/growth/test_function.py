"""The law of growth: under closed masks the larger network computes what the smaller one did, whatever is new in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import cveff
from cveff.errors import StepError
from cveff.model import Model
from cveff.train import Growth
from cveff.train.growth.growing import TOLERANCE, fresh, grown_from
from cveff.train.growth.masks import Masks, masked_paths
from cveff.train.growth.placement import place
from cveff.train.growth.sizes import specs_of

VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2}
RESNET = {"image_size": 32, "timm_arguments": {"layers": [1, 1, 1, 1], "channels": [64, 32, 32, 32]}}
CONVNEXT = {"image_size": 32, "depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
NORMS = {
    "qk_norm": True,
    "scale_attn_norm": True,
    "scale_mlp_norm": True,
    "init_values": 0.5,
    "pre_norm": True,
}

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("vit_tiny_patch16_224", VIT, {"depth": 4}),
    ("vit_tiny_patch16_224", VIT, {"width": 64}),
    ("vit_tiny_patch16_224", VIT, {"width": 64, "heads": 4}),
    ("vit_tiny_patch16_224", VIT, {"mlp_ratio": 6.0}),
    ("vit_tiny_patch16_224", VIT, {"image_size": 48}),
    (
        "vit_tiny_patch16_224",
        VIT,
        {"width": 64, "heads": 4, "depth": 3, "mlp_ratio": 5.0, "image_size": (48, 40)},
    ),
    ("vit_tiny_patch16_224", {**VIT, **NORMS}, {"width": 48, "depth": 3}),
    ("vit_so150m_patch16_reg4_gap_256", VIT, {"width": 64, "heads": 4, "depth": 3}),
    ("vit_base_patch16_siglip_224", VIT, {"width": 64, "depth": 3}),
    ("resnet18", RESNET, {"depth": (2, 1, 2, 2), "width": (64, 48, 64, 96), "image_size": 48}),
    ("seresnet18", RESNET, {"width": (64, 64, 64, 64)}),
    ("convnext_atto", CONVNEXT, {"depth": (2, 1, 2, 2), "width": (8, 24, 48, 64)}),
    ("convnextv2_atto", CONVNEXT, {"width": (16, 24, 48, 64)}),
    (
        "small_resnet_s",
        {"image_size": 8, "widths": [4, 8], "depths": [1, 1]},
        {"depth": (1, 2), "width": (6, 12)},
    ),
]


def trained_looking(architecture: str, arguments: dict[str, Any]) -> Model:
    """A model none of whose weights is zero or one by initialisation."""
    torch.manual_seed(0)
    model = cveff.create(architecture, num_classes=7, **arguments)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in model.module.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    model.module.eval()
    return model


def with_large_new_weights(module: nn.Module, old: nn.Module) -> None:
    """Everything of `module` random with σ = 10, but for `old`'s weights in their places."""
    placement = place(old, module)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(10 * torch.randn_like(value).abs())
            if name in old.state_dict():
                placement.put(name, old.state_dict()[name], value)


@pytest.mark.parametrize(("architecture", "arguments", "sizes"), CASES)
def test_outputs_stay_for_arbitrary_new_weights(
    architecture: str, arguments: dict[str, Any], sizes: dict[str, Any]
) -> None:
    model = trained_looking(architecture, arguments)
    (spec,) = specs_of(model, [Growth(at=0.5, **sizes)])
    grown = grown_from(model, spec, seed=1)
    old = copy.deepcopy(model.module)
    if "image_size" in sizes and hasattr(old, "set_input_size"):
        old.set_input_size(img_size=spec.input.size)
    larger = grown.model.module.eval()
    with_large_new_weights(larger, old)
    grown.masks.attach(larger)
    images = torch.randn(3, spec.input.channels, *spec.input.size, dtype=torch.float64)
    with torch.no_grad():
        expected = old.double()(images)
        assert (larger.double()(images) - expected).abs().max() <= 1e-12 * max(1, expected.abs().max())
        assert (larger.float()(images.float()) - expected).abs().max() <= TOLERANCE * max(
            1, expected.abs().max()
        )
        grown.masks.detach()
        if set(sizes) != {"image_size"}:
            assert not torch.allclose(
                larger(images.float()).double(), expected, atol=1e-3
            )  # the masks kept it
    assert list(masked_paths(larger)) == []


@pytest.mark.parametrize(("architecture", "arguments", "sizes"), [CASES[6], CASES[8], CASES[12], CASES[9]])
def test_open_masks_are_the_plain_network(
    architecture: str, arguments: dict[str, Any], sizes: dict[str, Any]
) -> None:
    model = trained_looking(architecture, arguments)
    (spec,) = specs_of(model, [Growth(at=0.5, **sizes)])
    grown = grown_from(model, spec, seed=1)
    module = grown.model.module.double().eval()
    images = torch.randn(2, spec.input.channels, *spec.input.size, dtype=torch.float64)
    with torch.no_grad():
        plain = module(images)
        grown.masks.attach(module)
        grown.masks.value = 1.0
        torch.testing.assert_close(module(images), plain, rtol=1e-9, atol=1e-10)


def test_old_weights_keep_their_places_within_heads() -> None:
    model = trained_looking("vit_tiny_patch16_224", VIT)
    (spec,) = specs_of(model, [Growth(at=0.5, width=64, heads=4)])
    larger = grown_from(model, spec, seed=1).model.module
    old = model.module.blocks[0].attn.qkv.weight.view(3, 2, 16, 32)
    new = larger.blocks[0].attn.qkv.weight.view(3, 4, 16, 64)
    assert torch.equal(new[:, :2, :, :32], old)
    assert float(new[:, 2:].detach().std()) == pytest.approx(
        0.02, rel=0.1
    )  # initialised as the architecture does


def test_a_grown_model_saves_and_loads_to_the_bit(tmp_path: Any) -> None:
    model = trained_looking("vit_tiny_patch16_224", VIT)
    (spec,) = specs_of(model, [Growth(at=0.5, width=48, heads=3, depth=3)])
    grown = grown_from(model, spec, seed=1).model
    cveff.save(grown, tmp_path / "model")
    images = torch.randn(2, 3, 32, 32)
    loaded = cveff.load(tmp_path / "model")
    assert loaded.spec == spec
    assert torch.equal(loaded.module(images), grown.module.eval()(images))


def test_heads_grow_alone_where_they_were_made_fewer(tmp_path: Any) -> None:
    model = trained_looking("vit_tiny_patch16_224", {**VIT, "num_heads": 4})
    events = [Growth(at=0, heads=1), Growth(at=0.5, heads=3), Growth(at=0.7, heads=4)]
    specs = specs_of(model, events)
    start = fresh(specs[0], 0)
    assert start.module.blocks[0].attn.qkv.weight.shape == (3 * 8, 32)
    grown = grown_from(grown_from(start, specs[1], 1).model, specs[2], 2)
    assert grown.model.spec == model.spec and grown.difference < 1e-12
    cveff.save(start, tmp_path / "model")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(cveff.load(tmp_path / "model").module(images), start.module.eval()(images))


@pytest.mark.parametrize(
    ("architecture", "arguments", "sizes", "words"),
    [
        ("vit_tiny_patch16_224", VIT, {"depth": 1}, "only adds"),
        ("vit_tiny_patch16_224", VIT, {"width": 16}, "only adds"),
        ("vit_tiny_patch16_224", VIT, {"mlp_ratio": 1.0}, "only adds"),
        ("vit_tiny_patch16_224", VIT, {"image_size": 24}, "shrink"),
        ("vit_tiny_patch16_224", VIT, {"width": 33}, "no multiple"),
        ("resnet18", RESNET, {"width": (48, 32, 32, 32)}, "only adds"),
        ("resnet18", RESNET, {"heads": 3}, "no argument for growth.heads"),
        (
            "resnext50_32x4d",
            {"image_size": 32, "timm_arguments": {"layers": [1, 1, 1, 1], "channels": [64, 64, 64, 64]}},
            {"width": (64, 128, 64, 64)},
            r"layer2\.0\.conv2 has 32 groups",
        ),
        (
            "eca_resnet33ts",
            {"image_size": 32},
            {"width": (512, 512, 2048, 2048)},
            "argument|kernel|same layers",
        ),
    ],
)
def test_what_does_not_grow_is_refused(
    architecture: str, arguments: dict[str, Any], sizes: dict[str, Any], words: str
) -> None:
    model = trained_looking(architecture, arguments)
    with pytest.raises(StepError, match=words):
        grown_from(model, specs_of(model, [Growth(at=0.5, **sizes)])[0], seed=1)


def test_compressed_models_are_refused() -> None:
    from cveff.compress.drop_blocks import DropBlocks

    model = cveff.apply(trained_looking("vit_tiny_patch16_224", VIT), DropBlocks(("blocks.1",)))
    with pytest.raises(StepError, match="has edits"):
        specs_of(model, [Growth(at=0.5, depth=4)])


def test_a_mixing_layer_without_a_mask_is_found_by_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_looking("vit_tiny_patch16_224", VIT)
    (spec,) = specs_of(model, [Growth(at=0.5, width=64)])
    monkeypatch.setattr(Masks, "attach", lambda self, module: None)
    with pytest.raises(StepError, match="compute something else"):
        grown_from(model, spec, seed=1)
