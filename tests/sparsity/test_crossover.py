"""The share from which the whole layer is faster, by a clock that is told the times."""

from __future__ import annotations

import pytest
import torch

from cveff.sparsity import crossover as subject


@pytest.mark.parametrize(("slope", "expected"), [(1.5, 0.625), (1.0, 1.0), (0.5, 1.0), (20.0, 0.0)])
def test_it_is_the_largest_share_that_is_no_slower(
    monkeypatch: pytest.MonkeyPatch, slope: float, expected: float
) -> None:
    monkeypatch.setattr(subject, "_seconds", lambda call, device: call())
    found = subject.crossover(lambda: 1.0, lambda index: slope * len(index) / 80, 80, torch.device("cpu"))
    assert found == expected


def test_parts_are_in_range_and_without_doubles() -> None:
    seen = []
    subject.crossover(lambda: torch.zeros(1), lambda index: seen.append(index), 3, torch.device("cpu"))
    assert seen and all(0 < len(index) <= 3 and len(set(index.tolist())) == len(index) for index in seen)
    assert max(int(index.max()) for index in seen) == 2
