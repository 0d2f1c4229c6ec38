"""Which weights are projected, over architectures; and the optimizer through `Train` and a recipe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import cveff
from cveff.data import Augmentation
from cveff.data import load as load_data
from cveff.errors import RecipeError, TrainingError
from cveff.recipe import parse_recipe
from cveff.train import GaLore, GaLoreAdamW, Train, galore_groups
from cveff.train.layers import classifier_paths, hidden_layers, repeated_blocks

EXPECTED = {
    # name: arguments, what is projected in its last block, and what is not
    "vit_tiny_patch16_224": (
        {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32},
        {"blocks.1.attn.qkv.weight": 8, "blocks.1.attn.proj.weight": 8, "blocks.1.mlp.fc1.weight": 8},
        {"patch_embed.proj.weight", "head.weight", "pos_embed", "cls_token", "blocks.1.norm1.weight"},
    ),
    "convnext_atto": (
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
        {"stages.3.blocks.0.mlp.fc1.weight": 4, "stages.2.downsample.1.weight": 4},
        {"stem.0.weight", "head.fc.weight", "stages.3.blocks.0.conv_dw.weight", "stages.3.blocks.0.gamma"},
    ),
    "resnet18": (
        {"channels": (16, 32, 32, 32)},
        {"layer4.1.conv2.weight": 8, "layer2.0.downsample.0.weight": 4},
        {"conv1.weight", "fc.weight", "layer4.1.bn2.weight"},
    ),
    "mobilenetv3_small_050": (
        {},
        {"blocks.3.0.conv_pw.weight": 6, "blocks.3.0.se.conv_reduce.weight": 6},
        {"conv_stem.weight", "classifier.weight", "blocks.3.0.conv_dw.weight"},
    ),
    "small_resnet_s": ({}, {"stages.2.1.conv1.conv.weight": 12}, {"stem.conv.weight", "fc.weight"}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_hidden_matrices_are_projected_and_nothing_else(name: str) -> None:
    arguments, projected, others = EXPECTED[name]
    module = timm.create_model(name, num_classes=10, **arguments)
    groups = galore_groups(module, update_proj_gap=50, scale=0.5, proj_type="reverse_std")
    ranks = {name: group.get("rank") for group in groups for name in group["param_names"]}
    assert sorted(ranks) == sorted(name for name, _ in module.named_parameters())
    assert {name: ranks[name] for name in projected} == projected
    assert all(ranks[name] is None for name in others)
    optimizer = GaLoreAdamW(groups, lr=0.1, weight_decay=0.2)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.2 if group["params"][0].ndim > 1 else 0.0)
        if group["rank"] is not None:
            assert (group["update_proj_gap"], group["scale"], group["proj_type"]) == (50, 0.5, "reverse_std")
            assert all(2 * group["rank"] <= min(p.shape[0], p[0].numel()) for p in group["params"])


def test_torchs_attention_is_projected_once_and_frozen_weights_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 2, 32), nn.Linear(16, 4))
    module[1].linear2.weight.requires_grad_(False)
    ranks = {name: group.get("rank") for group in galore_groups(module, 4) for name in group["param_names"]}
    assert ranks["1.self_attn.in_proj_weight"] == ranks["1.self_attn.out_proj.weight"] == 4
    assert "1.linear2.weight" not in ranks and ranks["0.weight"] is ranks["2.weight"] is None
    assert classifier_paths(module) == {"2"}


def test_a_rank_that_fits_nothing_or_is_none_is_refused() -> None:
    module = cveff.create("small_resnet_s", num_classes=10, image_size=8, channels=1).module
    with pytest.raises(TrainingError, match="SmallResNet has no trainable weight to project at rank 100"):
        galore_groups(module, 100)
    for rank in (0, -1, 1.5, True):
        with pytest.raises(TrainingError, match="rank is"):
            galore_groups(module, rank)


def test_blocks_are_the_members_of_lists() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", depth=3)
    assert list(repeated_blocks(vit)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert next(path for path, _ in hidden_layers(vit)) == "blocks.0.attn.qkv"
    assert len(repeated_blocks(timm.create_model("resnet18"))) == 8


TRAIN = Train(
    epochs=6, batch_size=64, optimizer="galore", precision="fp32", warmup_epochs=1, learning_rate=0.01
)


@pytest.mark.parametrize(
    "galore", [GaLore(update_proj_gap=7), GaLore(layerwise=True, residual=True, carry="rotate")], ids=str
)
def test_train_learns_digits(galore: GaLore) -> None:
    data = load_data("digits", seed=0)
    data = replace(data, train=data.train.subset(np.arange(1280)), val=data.val.subset(np.arange(140)))
    arguments = {"patch_size": 2, "depth": 1, "embed_dim": 32, "num_heads": 2}
    torch.manual_seed(0)
    model = cveff.create(
        "vit_tiny_patch16_224", labels=data.labels, image_size=8, channels=1, timm_arguments=arguments
    )
    settings = replace(TRAIN, galore=galore, augmentation=Augmentation())
    trained = cveff.apply(model, settings, data=data, device="cpu")
    from cveff.train.evaluate import evaluate

    assert evaluate(trained.module, data.val, model.spec.input)["accuracy"] > 0.35  # chance is 0.1
    weight = trained.module.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    trained.module(torch.zeros(2, 1, 8, 8)).sum().backward()
    assert torch.equal(weight, before)  # no hook of a layer-wise optimizer is left behind


def test_a_recipe_sets_what_is_projected() -> None:
    values = {"data": {"source": "digits"}, "train": {"optimizer": "galore", "galore": {"rank": 16}}}
    recipe = parse_recipe(values)
    assert recipe.train.galore == GaLore(rank=16) and recipe.train.peak_learning_rate == 1e-3
    assert parse_recipe(recipe.to_json()) == recipe
    for change, words in (
        ({"galore": {"rank": 0}}, r"train\.galore\.rank is 0"),
        ({"galore": {"proj_type": "top"}}, r"train\.galore\.proj_type: 'top' is unknown"),
        ({"galore": {"ranks": 1}}, "did you mean 'rank'"),
        (
            {"galore": {"layerwise": True}, "clip_norm": 1.0},
            r"train\.clip_norm is 1\.0, and train\.galore\.layer",
        ),
        ({"galore": {"layerwise": True}, "accumulation": 2, "batch_size": 64}, r"train\.accumulation is 2"),
        ({"optimizer": "sgd"}, r"train\.galore is set and train\.optimizer is 'sgd'"),
        ({"offload_optimizer": True, "galore": {"layerwise": True}}, "turn one off"),
    ):
        with pytest.raises(RecipeError, match=words):
            parse_recipe({**values, "train": {**values["train"], **change}})
