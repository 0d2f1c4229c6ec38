"""What a run consumed."""

from __future__ import annotations

import torch
from torch import nn

import cveff
from cveff.train.compute import forward_flops


def test_operations_are_two_for_a_multiply_accumulate_and_leave_the_network_as_it_was() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(2, 3, 8, 8)
    assert forward_flops(network, images) == 2 * 2 * (8 * 36 * 27 + 8 * 36 * 5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_view_of_a_parameter_is_no_obstacle() -> None:
    """The pooling's query is one, expanded to the batch."""
    model = cveff.create("test_vit", 10, image_size=32, channels=1, global_pool="map")
    assert forward_flops(model.module.train(), torch.randn(2, 1, 32, 32)) > 0
