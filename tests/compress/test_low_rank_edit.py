"""`LowRankEdit`: geometry kept, replayed at load bit for bit, refused where it would change the meaning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import cveff
from cveff.compress.low_rank_edit import (
    METHODS,
    LowRankEdit,
    build,
    geometry,
    largest_rank,
    not_factorisable,
)
from cveff.edits import edit_from_json, edit_to_json
from cveff.errors import CheckpointError, StepError

CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 4, "stride": 4},
    {"kernel_size": 1, "stride": 2},
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_a_chain_at_full_rank_computes_the_convolution(method: str, settings: dict) -> None:
    """With the factors' own weights: stride, padding and dilation each land on the right factor."""
    from cveff.compress import low_rank_math as math

    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, **settings).double()
    if layer.kernel_size == (1, 1) and method != "svd":
        with pytest.raises(StepError, match="1×1 kernel and takes svd"):
            build(layer, "conv", method, (2, 2))
        return
    rank = largest_rank(layer, method)
    weight = layer.weight.detach()
    if method == "svd":
        factors = math.svd_factors(weight, math.output_basis(weight.flatten(1)), *rank)
    elif method == "tucker":
        factors = math.tucker_factors(weight, rank)
    else:
        factors = math.SpatialSplit(weight, method.removeprefix("spatial-"), *rank).factors(*rank)
    chain = build(layer, "conv", method, rank)
    with torch.no_grad():
        for part, factor in zip(chain, factors, strict=True):
            part.weight.copy_(factor)
        chain[-1].bias.copy_(layer.bias)
        x = torch.randn(2, 6, 17, 19, dtype=torch.float64)
        assert torch.allclose(chain(x), layer(x), rtol=1e-5, atol=1e-7)
    assert all(part.bias is None for part in chain[:-1])


def test_smaller_ranks_have_fewer_weights() -> None:
    layer = nn.Conv2d(64, 64, 3, padding=1)
    (whole,) = geometry(layer)
    for method in METHODS:
        rank = (16, 16) if method == "tucker" else (16,)
        assert sum(factor.num_weights for factor in geometry(layer, method, rank)) < whole.num_weights


def test_json_and_back() -> None:
    edit = LowRankEdit({"a": {"method": "svd", "rank": [8]}, "b.c": {"method": "tucker", "rank": (4, 6)}})
    again = edit_from_json(json.loads(json.dumps(edit_to_json(edit))))
    assert again == edit
    assert edit.layers["a"]["rank"] == (8,)
    hash(edit)


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        (
            "small_resnet_s",
            {"stages.1.1.conv1.conv": ("spatial-vertical", 8), "fc": ("svd", 2)},
        ),
        (
            "vit_tiny_patch16_224",
            {
                "blocks.0.attn.qkv": ("svd", 8),
                "blocks.0.attn.proj": ("svd", 16),
                "patch_embed.proj": ("svd", 8),
            },
        ),
        (
            "resnet10t",
            {
                "layer1.0.conv1": ("spatial-vertical", 8),
                "layer2.0.conv1": ("spatial-horizontal", 8),
                "layer3.0.conv1": ("tucker", 16),
            },
        ),
    ],
)
def test_save_and_load_give_bit_equal_outputs(architecture: str, layers: dict, tmp_path: Path) -> None:
    model = cveff.create(architecture, num_classes=3, image_size=32)
    choices = {
        path: {"method": method, "rank": (rank, rank) if method == "tucker" else (rank,)}
        for path, (method, rank) in layers.items()
    }
    changed = cveff.apply(model, LowRankEdit(choices))
    assert changed.num_parameters < model.num_parameters
    cveff.save(changed, tmp_path / "model")
    again = cveff.load(tmp_path / "model")
    images = torch.randn(2, model.spec.input.channels, 32, 32)
    with torch.inference_mode():
        assert torch.equal(changed.module.eval()(images), again.module(images))
    assert again.spec == changed.spec


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"fc": {"method": "qr", "rank": [2]}}, "method 'qr'; known: svd"),
        ({"fc": {"method": "svd", "rank": [0]}}, r"rank \[0\]; svd takes 1 positive"),
        ({"fc": {"method": "svd", "rank": 4}}, "rank 4; svd takes 1"),
        ({"fc": {"method": "tucker", "rank": [4]}}, "tucker takes 2"),
        ({"fc": {"method": "svd"}}, "give a method and a rank"),
    ],
)
def test_bad_choices_are_refused_at_construction(layers: dict, words: str) -> None:
    with pytest.raises(StepError, match=words):
        LowRankEdit(layers)


def test_what_does_not_fit_is_refused_with_its_path() -> None:
    module = nn.Sequential(
        nn.Linear(4, 6),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, (1, 3)),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    )
    for path, method, words in [
        ("0", "spatial-vertical", "'0' is linear and takes svd"),
        ("1", "svd", "'1' is a ReLU"),
        ("2", "svd", "'2' is depthwise"),
        ("3", "svd", "'3' has 2 groups"),
        ("4", "spatial-vertical", "1×3 kernel, which spatial-vertical cannot split"),
        ("5", "svd", "pads with 'reflect'"),
        ("6", "svd", "padding 'same'"),
        ("7", "svd", "'7' "),
        ("8", "svd", "no layer '8'"),
    ]:
        with pytest.raises(StepError, match=words):
            LowRankEdit({path: {"method": method, "rank": (2,)}}).apply(module)
    with pytest.raises(StepError, match=r"rank at most \(4,\) by svd, not \(5,\)"):
        LowRankEdit({"0": {"method": "svd", "rank": (5,)}}).apply(module)
    assert not_factorisable(module[0]) == ""


def test_a_model_file_with_wrong_fields_is_damaged() -> None:
    with pytest.raises(CheckpointError, match="do not fit"):
        edit_from_json({"kind": "low_rank", "ranks": {}})
