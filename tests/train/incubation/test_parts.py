"""How networks are divided: every tensor has one owner, blocks are shared out evenly, meta layers run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cveff
from cveff.errors import StepError
from cveff.model import Model
from cveff.train.incubation.parts import divide, reduced

EXPECTED = {
    ("vit", 4): [2, 2, 1, 1],
    ("vit", 6): [1, 1, 1, 1, 1, 1],
    ("resnet", 4): [2, 2, 2, 2],
    ("convnext", 3): [2, 2, 2],
}


@pytest.mark.parametrize(("name", "count"), EXPECTED)
def test_blocks_are_shared_out_evenly_and_each_tensor_once(
    network: Callable[[str], Model], name: str, count: int
) -> None:
    model = network(name)
    parts = divide(model.module, model.spec.input, count)
    assert [len(part.blocks) for part in parts] == EXPECTED[name, count]
    names = [tensor for part in parts for tensor in part.tensors]
    assert sorted(names) == sorted(model.module.state_dict())
    for part in parts:
        assert len(part.surplus) == len(part.blocks) - 1  # one block stands in for it
        mine = {tensor for tensor in model.module.state_dict() if part.is_in_blocks(tensor)}
        assert mine and mine <= part.tensors


def test_stem_and_head_belong_to_the_ends_and_steps_between_stages_to_what_follows(
    network: Callable[[str], Model],
) -> None:
    model = network("convnext")
    parts = divide(model.module, model.spec.input, 3)
    assert parts[0].blocks == ("stages.0.blocks.0", "stages.1.blocks.0")
    assert {"stem.0.weight", "stages.1.downsample.1.weight"} <= parts[0].tensors
    assert "stages.2.downsample.1.weight" in parts[1].tensors
    assert {"stages.3.downsample.1.weight", "head.fc.weight", "head.norm.weight"} <= parts[2].tensors
    vit = network("vit")
    first, *_, last = divide(vit.module, vit.spec.input, 4)
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= first.tensors
    assert {"norm.weight", "head.bias"} <= last.tensors


def test_a_resnet_keeps_the_blocks_that_change_its_width(network: Callable[[str], Model]) -> None:
    model = network("resnet")
    parts = divide(model.module, model.spec.input, 4)
    assert [part.surplus for part in parts] == [("layer1.1",), ("layer2.1",), ("layer3.1",), ("layer4.1",)]
    assert "layer2.0.bn1.num_batches_tracked" in parts[1].tensors


@pytest.mark.parametrize("name", ["vit", "resnet", "convnext"])
def test_the_meta_model_and_each_module_in_it_run(network: Callable[[str], Model], name: str) -> None:
    model = network(name)
    parts = divide(model.module, model.spec.input, 3)
    sizes = []
    for index in (None, 0, 1, 2):
        module = reduced(parts, index).apply(copy.deepcopy(model.module)).eval()
        assert module(torch.zeros(2, 1, *model.spec.input.size)).shape == (2, 10)
        sizes.append(sum(parameter.numel() for parameter in module.parameters()))
    whole = model.num_parameters
    assert (
        sum(sizes[1:]) - 3 * sizes[0] == whole - sizes[0]
    )  # each module adds its own surplus, and only that


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("mobilenetv2_035", {"image_size": 32}),
        ("regnety_002", {"image_size": 64}),
        ("swin_tiny_patch4_window7_224", {"image_size": 56, "embed_dim": 24, "depths": [1, 1, 2, 1]}),
    ],
)
def test_other_families_are_divided_too(architecture: str, arguments: dict[str, Any]) -> None:
    model = cveff.create(architecture, num_classes=3, **arguments)
    parts = divide(model.module, model.spec.input, 3)
    assert sorted(name for part in parts for name in part.tensors) == sorted(model.module.state_dict())
    assert all(part.blocks for part in parts)
    module = reduced(parts, 1).apply(model.module).eval()
    assert module(torch.zeros(1, 3, *model.spec.input.size)).shape == (1, 3)


@pytest.mark.parametrize("count", [0, 7])
def test_more_modules_than_blocks_are_refused(network: Callable[[str], Model], count: int) -> None:
    model = network("vit")
    with pytest.raises(StepError, match=r"has 6 blocks.*1 to 6"):
        divide(model.module, model.spec.input, count)
