"""The law over architectures: what is pruned equals the dense network with those channels at zero.

The smallest of each family, at a small size, and whether every group could go; the whole list at full size is
`tools/benchmarks/prune_coverage.py`'s.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cveff
from cveff.compress.analysis import analyze, check, describe
from cveff.compress.proof import awakened

WHOLE: dict[str, dict[str, object]] = {
    "test_resnet": {},  # residual blocks
    "test_efficientnet": {},  # depthwise convolutions, squeeze and excite
    "test_mambaout": {},
    "regnetx_002": {},  # grouped convolutions
    "lcnet_035": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},  # layer scale, norms over channels
    "inception_next_atto": {"depths": (1, 1, 1, 1)},  # splits
    "edgenext_xx_small": {"depths": (1, 2, 2, 2)},  # cross-covariance attention
    "test_vit": {},  # packed attention, a resized position table
    "swin_tiny_patch4_window7_224": {  # windows that roll, patches that merge
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
    },
    "levit_128s": {
        "embed_dim": (32, 48),
        "num_heads": (2, 3),
        "depth": (1, 1),
        "key_dim": 8,
    },  # cached biases
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},  # keys and values of fewer tokens
    "convit_tiny": {
        "depth": 2,
        "local_up_to_layer": 1,
        "embed_dim": 32,
        "num_heads": 4,
    },  # a table kept from one run to the next
    "mobilevitv2_050": {},  # unfolded patches
    "efficientvit_b0": {},  # linear attention, regions without autocast
}


def random_keep(groups: object, seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {group.name: random.permutation(group.size) < max(1, group.size // 2) for group in groups}  # type: ignore[attr-defined]


def created(name: str) -> cveff.Model:
    torch.manual_seed(0)
    return cveff.create(name, 10, image_size=64, **WHOLE.get(name, {}))


@pytest.mark.parametrize("name", WHOLE)
def test_half_of_every_group_goes_and_the_rest_computes_the_same(name: str) -> None:
    model = created(name)
    analysis = analyze(model.module, model.spec.input)
    assert analysis.groups
    dense = awakened(model.module, seed=5)
    keep = random_keep(analysis.groups)
    images = torch.randn(2, 3, *model.spec.input.size)
    assert check(dense, analysis, keep, images) < 1e-4
    refused = {group.name: group.reason for group in analysis.frozen if "output" not in group.reason}
    assert len(refused) <= len(analysis.groups) // 2, refused
    before = sum(parameter.numel() for parameter in dense.parameters())
    after = sum(parameter.numel() for parameter in analysis.edit(keep, dense).apply(dense).parameters())
    assert after < 0.5 * before


def test_what_is_frozen_says_which_operator_and_where() -> None:
    model = created("ecaresnet26t")
    found = describe(analyze(model.module, model.spec.input))
    assert found["groups"]
    reasons = [item["reason"] for item in found["frozen"].values()]
    assert any("conv1d" in reason and "slides over channels" in reason for reason in reasons)


def test_analysing_leaves_the_network_as_it_was() -> None:
    model = created("levit_128s")
    model.module.train()
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    analyze(model.module, model.spec.input)
    assert model.module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert not any(module._forward_hooks for module in model.module.modules())


def test_the_same_seed_finds_the_same_groups() -> None:
    model = created("test_resnet")
    first, second = (describe(analyze(model.module, model.spec.input)) for _ in range(2))
    assert first == second
