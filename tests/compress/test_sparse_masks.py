"""Masks keep what they say, exactly as many as they say, and the schedule runs from nothing to the end."""

from __future__ import annotations

import pytest
import torch

from cveff.compress.sparse_masks import (
    cubic_sparsity,
    is_two_of_four,
    keep_largest,
    keep_two_of_four,
    zero_share,
)


def test_two_of_four_by_hand() -> None:
    scores = torch.tensor([[1.0, 4, 3, 2, 9, 9, 1, 1]])
    assert keep_two_of_four(scores).tolist() == [[False, True, True, False, True, True, False, False]]


def test_two_of_four_of_equal_scores_keeps_two() -> None:
    assert keep_two_of_four(torch.zeros(3, 8, 3, 3)).sum() == 3 * 4 * 9


@pytest.mark.parametrize("shape", [(6, 8), (5, 12, 3, 3), (4, 4, 1, 1)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_fours_lie_along_the_input_channels_of_each_pixel(
    shape: tuple[int, ...], memory: torch.memory_format
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if len(shape) == 4:
        weight = weight.to(memory_format=memory)
    keep = keep_two_of_four(weight.abs())
    assert keep.shape == weight.shape
    # As NVIDIA states it: for each output channel and each pixel of the kernel, two of every four input channels.
    for first in range(0, shape[1], 4):
        four, kept = weight[:, first : first + 4].abs(), keep[:, first : first + 4]
        assert (kept.sum(dim=1) == 2).all()
        smallest_kept = torch.where(kept, four, torch.inf).amin(dim=1)
        largest_dropped = torch.where(kept, -torch.inf, four).amax(dim=1)
        assert (smallest_kept >= largest_dropped).all()
    assert is_two_of_four(weight * keep)
    assert not is_two_of_four(weight)
    assert zero_share(weight * keep) == 0.5


def test_a_reduction_that_is_no_multiple_of_four_has_no_pattern() -> None:
    assert not is_two_of_four(torch.zeros(4, 6))


@pytest.mark.parametrize("by_row", [False, True])
def test_the_smallest_go(by_row: bool) -> None:
    scores = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    kept = keep_largest(scores, 0.5, by_row)
    expected = [[False, False, True, True]] * 2 if by_row else [[False] * 4, [True] * 4]
    assert kept.tolist() == expected


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77, 0.999])
def test_the_count_is_exact_even_for_ties(sparsity: float) -> None:
    kept = keep_largest(torch.zeros(7, 5, 3, 3), sparsity, by_row=False)
    assert int((~kept).sum()) == round(sparsity * kept.numel())


def test_the_cubic_schedule_by_hand() -> None:
    assert cubic_sparsity(0.0, 0.8) == 0
    assert cubic_sparsity(0.5, 0.8) == pytest.approx(0.8 * (1 - 1 / 8))
    assert cubic_sparsity(0.5, 0.8, 0.2) == pytest.approx(0.8 - 0.6 / 8)
    assert cubic_sparsity(1.0, 0.8) == cubic_sparsity(3.0, 0.8) == 0.8
