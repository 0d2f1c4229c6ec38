"""What a layer can be replaced by, and what that takes and costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cveff.compress.low_rank_cost import block_of
from cveff.compress.low_rank_edit import build, geometry
from cveff.compress.low_rank_options import Stage, candidate_ranks, chain, layer_options, macs

PER_MILLISECOND = 1e6


def macs_cost(stages: Sequence[Stage]) -> list[float]:
    """A device on which every multiply–add takes the same time."""
    return [macs([stage]) / PER_MILLISECOND for stage in stages]


def test_layers_that_gain_nothing_have_no_options() -> None:
    layer, shape = nn.Conv2d(32, 32, 3, padding=1), (1, 32, 8, 8)
    assert layer_options(layer, shape, macs_cost).options
    flat = layer_options(layer, shape, lambda stages: [1.0] * len(stages))
    assert (
        not flat.options and "would not get 5% faster: the best rank takes 2.000 ms, not 1.000" in flat.reason
    )
    tight = layer_options(layer, shape, macs_cost, max_error=1e-6)
    assert not tight.options and "loses at least" in tight.reason
    assert "so small" in layer_options(nn.Linear(6, 6), (1, 6), macs_cost).reason
    times = [option.milliseconds for option in layer_options(layer, shape, macs_cost).options]
    errors = [option.error for option in layer_options(layer, shape, macs_cost).options]
    assert times == sorted(times) and errors == sorted(errors, reverse=True)


def test_chains_know_their_shapes_and_operations() -> None:
    layer = nn.Conv2d(16, 24, 3, stride=2, padding=2, dilation=2)
    for method, rank in (("svd", (8,)), ("spatial-vertical", (8,)), ("tucker", (8, 16))):
        x = torch.zeros(1, 16, 13, 17)
        stages = chain(geometry(layer, method, rank), tuple(x.shape))
        with FlopCounterMode(display=False) as counter:
            for part, (_, shape) in zip(build(layer, "x", method, rank), stages, strict=True):
                assert tuple(x.shape) == shape
                x = part(x)
        assert macs(stages) == counter.get_total_flops() / 2
    assert all(rank % 8 == 0 for (rank,) in candidate_ranks(layer, "svd"))
    assert candidate_ranks(nn.Linear(64, 64), "tucker") == []
    assert candidate_ranks(nn.Linear(64, 64), "svd", 16) == [(16,), (32,), (48,)]
    assert all(rank % 4 == 0 for pair in candidate_ranks(layer, "tucker", 4) for rank in pair)


def test_blocks_are_what_the_latency_table_measures() -> None:
    (first, _) = chain(geometry(nn.Conv2d(16, 24, 3, padding=2, dilation=2), "svd", (8,)), (1, 16, 9, 9))
    block = block_of(first)
    assert (block.kind, block.weight) == ("conv", (8, 16, 3, 3))
    assert (block.padding, block.dilation) == ((2, 2), (2, 2))
    assert block_of(chain(geometry(nn.Linear(8, 4)), (1, 5, 8))[0]).weight == (4, 8)
