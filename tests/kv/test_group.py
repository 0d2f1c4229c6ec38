"""Eviction by the kernel leaves, slot for slot, what PyTorch's leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cveff.errors import KernelError
from cveff.kernels import evict_tokens as kernel
from cveff.kv.group import Group
from cveff.kv.rule import PINNED, Rule
from cveff.kv.segment import Segment

RULES = (
    Rule(),
    Rule(only_pinned=True),
    Rule(local=0.3),
    Rule(local=5, rerotate=True),
    Rule(frequent=0.4),
    Rule(local=0.2, frequent=7),
    Rule(local=0.3, frequent=0.3, apart=True),
    Rule(local=4, frequent=0.5, normalize=True, length=40),
)


def group(rules: list[Rule], lengths: list[int], seen: int, dtype: torch.dtype, seed: int) -> Group:
    random = torch.Generator().manual_seed(seed)
    needs = any(rule.needs_scores for rule in rules)
    segments = []
    for index, (rule, length) in enumerate(zip(rules, lengths, strict=True)):
        codes = torch.randperm(seen, generator=random)[:length].int()
        codes[torch.rand(length, generator=random) < 0.1] |= PINNED
        keys = torch.randn(length, 6, generator=random).to(dtype)
        scores = torch.rand(length, generator=random) if needs else None
        segments.append(Segment(index, rule, keys, 2 * keys[:, :4], codes, scores))
    return Group(segments, max(lengths) + 3, len(rules), None)


@settings(max_examples=60, deadline=None)
@given(
    rules=st.lists(st.sampled_from(RULES), min_size=1, max_size=4),
    data=st.data(),
    seen=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_the_kernel_evicts_as_pytorch_does(
    rules: list[Rule], data: st.DataObject, seen: int, dtype: torch.dtype, seed: int
) -> None:
    lengths = data.draw(st.lists(st.integers(0, seen), min_size=len(rules), max_size=len(rules)))
    ours = group(rules, lengths, seen, dtype, seed)
    theirs = copy.deepcopy(ours)
    ours.evict([seen], None)
    if theirs.evicts:
        theirs._evict([seen] * len(rules))
    assert ours.lengths == theirs.lengths
    for place, length in enumerate(ours.lengths):
        for name in ("_keys", "_values", "_codes"):
            assert torch.equal(getattr(ours, name)[place, :length], getattr(theirs, name)[place, :length])
    if ours._scores is not None:
        assert torch.equal(ours._scores, theirs._scores)


def test_equal_and_infinite_sums_are_not_kept_beyond_the_count() -> None:
    made = group([Rule(frequent=3)], [8], 100, torch.float32, 0)
    made._codes &= PINNED - 1
    made._scores[0, :8] = torch.tensor([1.0, torch.nan, torch.inf, 1.0, 1.0, 1.0, 2.0, 0.0])
    made.evict([100], None)
    assert made.lengths == [3] and sorted(made._scores[0, :3].tolist()) == [1, 1, 2]


def test_what_does_not_fit_is_refused() -> None:
    keys, codes = torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.int32)
    rules, lengths = torch.zeros(2, 6, dtype=torch.int64), torch.tensor([1, 4])
    kernel.evict_tokens(rules, keys, keys, codes, None, lengths)
    assert lengths.tolist() == [1, 4]
    with pytest.raises(KernelError, match="a length is not within 0 to 4"):
        kernel.evict_tokens(rules, keys, keys, codes, None, torch.tensor([1, 5]))
    with pytest.raises(KernelError, match="do not fit"):
        kernel.evict_tokens(rules[:1], keys, keys, codes, None, lengths)
    with pytest.raises(KernelError, match="give int64, int32, int64 and float32"):
        kernel.evict_tokens(rules, keys, keys, codes.long(), None, lengths)
    with pytest.raises(KernelError, match="ask can_run"):
        kernel.evict_tokens(rules, keys, keys, codes.T.contiguous().T, None, lengths)
