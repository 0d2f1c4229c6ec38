"""The law: an extracted sub-net computes what the elastic network computes with that choice, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cveff
from cveff.compress import Prune
from cveff.compress.blocks import blocks, macs
from cveff.compress.depth import skipped
from cveff.compress.proof import check
from cveff.compress.trace import trace
from cveff.dynamic import Elastic
from cveff.dynamic.elastic_space import ElasticSpace, SubNet
from cveff.dynamic.sandwich import resized
from cveff.dynamic.subnet_cost import SubNetCosts
from cveff.dynamic.supernet import Supernet
from cveff.errors import StepError
from cveff.measure.parity import relative_difference
from cveff.model import Model
from cveff.steps import Run

FAMILIES = ["resnet", "mobilenetv3", "mobilenetv4", "efficientnet", "convnext", "vit"]
FEW = ["resnet", "mobilenetv3", "convnext", "vit"]

Net = Callable[[str], tuple[Model, Supernet]]
Images = Callable[..., Tensor]


def some(space: ElasticSpace, count: int = 2) -> list[SubNet]:
    """The smallest, and random ones."""
    random = np.random.default_rng(1)
    drawn = [space.subnet([int(random.integers(n)) for n in space.alternatives]) for _ in range(count)]
    return [space.smallest, *drawn]


def run(module: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return module(batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_extracted_sub_net_is_the_elastic_one_bit_for_bit(
    family: str, tmp_path: Path, net: Net, images: Images
) -> None:
    model, supernet = net(family)
    for number, subnet in enumerate(some(supernet.space)):
        batch = images(subnet.size, count=2 * number + 1)
        found = supernet.model(model.module.state_dict(), subnet)
        with torch.no_grad():
            elastic = supernet.run(model.module, subnet, batch)
        assert torch.equal(run(found.module, batch), elastic)
        cveff.save(found, tmp_path / str(number))
        loaded = cveff.load(tmp_path / str(number))
        assert torch.equal(run(loaded.module, batch), elastic)
        assert loaded.spec.input.size == subnet.size and loaded.num_parameters < model.num_parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_is_the_network_itself(family: str, net: Net, images: Images) -> None:
    model, supernet = net(family)
    batch = images((48, 48))
    with torch.no_grad():
        assert torch.equal(
            supernet.run(model.module, supernet.space.largest, batch), run(model.module, batch)
        )
    assert supernet.edits(supernet.space.largest) == ()


@pytest.mark.parametrize("family", FEW)
def test_narrow_sub_nets_compute_what_zeroed_channels_leave(family: str, net: Net, images: Images) -> None:
    model, supernet = net(family)
    space = supernet.space
    keep = {name: np.zeros(len(space.order[name]), bool) for name in space.widths}
    subnet = space.uniform(width=0.5)
    for name, count in subnet.widths:
        keep[name][list(space.order[name][:count])] = True
    batch = images((48, 48))
    assert check(model.module, supernet.analysis, keep, batch) < 1e-4
    small = supernet.analysis.edit(keep, model.module).apply(copy.deepcopy(model.module)).eval()
    found = supernet.model(model.module.state_dict(), subnet)
    assert torch.equal(run(found.module, batch), run(small, batch))


@pytest.mark.parametrize("family", FEW)
def test_shallow_sub_nets_compute_what_skipped_blocks_leave(family: str, net: Net, images: Images) -> None:
    model, supernet = net(family)
    subnet = supernet.space.uniform(depth=supernet.space.depth)
    assert subnet.dropped
    batch = images((48, 48))
    found = run(supernet.model(model.module.state_dict(), subnet).module, batch)
    with skipped(model.module, subnet.dropped):
        assert torch.equal(found, run(model.module, batch))


@pytest.mark.parametrize("family", ["mobilenetv3", "mobilenetv4", "efficientnet"])
def test_small_kernels_are_large_ones_with_zeros_around(family: str, net: Net, images: Images) -> None:
    model, supernet = net(family)
    subnet = supernet.space.uniform(kernel=3)
    whole = copy.deepcopy(model.module)
    for path, side in subnet.kernels:
        weight = whole.get_submodule(path).weight.data
        inner = weight[..., 1:-1, 1:-1].clone()
        assert (weight.shape[-1], side) == (5, 3)
        weight.zero_()[..., 1:-1, 1:-1] = inner
    batch = images((48, 48))
    found = run(supernet.model(model.module.state_dict(), subnet).module, batch)
    # Sums in another order: float32 noise alone.
    assert relative_difference(found.numpy(), run(whole, batch).numpy()) < 1e-5


def test_transformed_kernels_go_by_way_of_every_side(net: Net) -> None:
    """OFA's 7 → 5 → 3, written out."""
    model, supernet = net("convnext")
    path = "stages.0.blocks.0.conv_dw"
    state = model.module.state_dict()
    weight = state[f"{path}.weight"]
    for side in (5, 3):
        matrix = torch.eye(side**2) + state[supernet.space.matrix_of(path, side)]
        margin = (weight.shape[-1] - side) // 2
        middle = weight[..., margin:-margin, margin:-margin].reshape(-1, side**2)
        weight = (middle @ matrix).reshape(-1, 1, side, side)
    found = supernet.weights(state, supernet.space.uniform(kernel=3))[f"{path}.weight"]
    assert torch.allclose(found, weight, atol=1e-6)  # x + x D beside x (I + D)


def test_another_resolution_of_a_transformer_is_timms_own(net: Net, images: Images) -> None:
    model, supernet = net("vit")
    subnet = supernet.space.uniform(size=(32, 32))
    peer = copy.deepcopy(model.module)
    peer.set_input_size((32, 32))
    batch = images((32, 32))
    assert torch.equal(run(supernet.model(model.module.state_dict(), subnet).module, batch), run(peer, batch))


def test_sub_nets_of_a_pruned_network_are_networks_too(tmp_path: Path, images: Images) -> None:

    model = cveff.create("small_resnet_s", num_classes=3, image_size=16)
    small = cveff.apply(model, Prune(ratio=0.25, importance="magnitude", compensate=False, round_to=2))
    supernet = Elastic(round_to=2, resolutions=(12,)).prepare(small, Run())
    found = supernet.model(small.module.state_dict(), supernet.space.smallest)
    cveff.save(found, tmp_path / "small")
    batch = images((12, 12))
    assert torch.equal(run(cveff.load(tmp_path / "small").module, batch), run(found.module, batch))


@pytest.mark.parametrize("family", FEW)
def test_costs_are_those_of_the_sub_net_built_and_traced(family: str, net: Net) -> None:
    model, supernet = net(family)
    for subnet in some(supernet.space, count=1):
        found = supernet.model(model.module.state_dict(), subnet)
        traced = trace(found.module, found.spec.input)
        costs = SubNetCosts(supernet)
        assert costs.macs(subnet) == macs(traced)
        assert [block.key for block in blocks(*costs._traced(subnet))] == [
            block.key for block in blocks(traced)
        ]


def test_a_sub_net_that_was_not_trained_is_named(net: Net) -> None:
    space = net("mobilenetv3")[1].space
    supernet = net("mobilenetv3")[1]
    for wrong, message in [
        ({"width": 0.6}, r"width 0.6 was not trained; trained are 1.0, 0.75, 0.5"),
        ({"depth": 5}, "depth 5 was not trained"),
        ({"kernel": 7}, "kernel 7 was not trained; trained are 5, 3"),
        ({"size": (40, 40)}, r"size \(40, 40\) was not trained"),
    ]:
        with pytest.raises(StepError, match=message):
            space.uniform(**wrong)
    good = space.smallest
    name, count = good.widths[0]
    bad: Sequence[tuple[SubNet, str]] = [
        (replace(good, widths=((name, count + 1), *good.widths[1:])), f"channels of {name}"),
        (replace(good, widths=good.widths[1:]), "is missing, or not elastic"),
        (replace(good, dropped=(*good.dropped, "blocks.0")), "block blocks.0 may not go"),
        (replace(good, dropped=("blocks.2.1",)), "blocks go in the order blocks.2.2, blocks.2.1"),
        (replace(good, size=(40, 40)), "was not trained"),
        (replace(good, kernels=(*good.kernels, ("conv_stem", 3))), "conv_stem is missing, or not elastic"),
    ]
    for subnet, message in bad:
        with pytest.raises(StepError, match=message):
            supernet.edits(subnet)
    with pytest.raises(StepError, match="do not exist"):
        space.subnet([0])
    assert SubNet.from_json(good.to_json()) == good
    with pytest.raises(StepError, match="describes no sub-net"):
        SubNet.from_json({"widths": {}})


def test_another_networks_space_is_refused(net: Net) -> None:
    model, supernet = net("resnet")
    other = net("mobilenetv3")[1].space
    with pytest.raises(StepError, match="train it again"):
        Supernet(model.spec, other, supernet.analysis)


def test_images_are_resized_as_torch_does(images: Images) -> None:
    batch = images((48, 48))
    assert resized(batch, (48, 48)) is batch
    assert resized(batch, (32, 24)).shape == (3, 3, 32, 24)
