"""Ragged decode attention: equal to PyTorch's on every segment, whatever lies in the room between segments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cveff.errors import KernelError
from cveff.kernels.decode_attention import choice, decode_attention

# A bfloat16 answer is rounded once; PyTorch's own also rounds the weights, so its sum is taken in float32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def cache(
    lengths: list[int], slack: list[int], head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, offsets and lengths; what lies in the room after a segment is not a number."""
    room = [length + more for length, more in zip(lengths, slack, strict=True)]
    offsets = torch.tensor([0, *room], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(len(lengths))
    k, v = (torch.randn(sum(room), head_dim, generator=generator).to(dtype) for _ in range(2))
    for begin, length, end in zip(offsets[:-1], lengths, offsets[1:], strict=True):
        k[begin + length : end] = v[begin + length : end] = float("nan")
    return k, v, offsets, torch.tensor(lengths, dtype=torch.int32)


def expected(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """PyTorch's attention, a segment at a time, in float64."""
    grouped = q.double().reshape(len(lengths), -1, q.shape[-1])
    found = torch.zeros_like(grouped)
    for segment, length in enumerate(lengths.tolist()):
        rows = slice(int(offsets[segment]), int(offsets[segment]) + length)
        if length:
            found[segment] = F.scaled_dot_product_attention(
                grouped[segment], k[rows].double(), v[rows].double(), scale=scale
            )
    return found.reshape(q.shape)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([1, 8, 33, 64, 80]),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    implementation=st.sampled_from(["reference", "cpu"]),
)
def test_it_is_pytorchs_attention_on_every_segment(
    batch: int, heads: int, group: int, head_dim: int, data: st.DataObject, dtype: torch.dtype,
    implementation: str,
) -> None:  # fmt: skip
    segments = batch * heads
    lengths = data.draw(st.lists(st.integers(0, 600), min_size=segments, max_size=segments))
    slack = data.draw(st.lists(st.integers(0, 9), min_size=segments, max_size=segments))
    ragged = cache(lengths, slack, head_dim, dtype)
    q = torch.randn(batch, heads * group, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = decode_attention(q, *ragged, head_dim**-0.5, implementation=implementation)
    assert found.dtype == dtype and found.shape == q.shape
    want = expected(q, *ragged, head_dim**-0.5)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=TOLERANCE[dtype] * max(1, want.abs().max()))


def test_scores_of_any_size_do_not_overflow() -> None:
    k, v, offsets, lengths = cache([300, 1], [0, 3], 16, torch.float32)
    q = torch.randn(1, 2, 16) * 1e4
    found = decode_attention(q, k, v, offsets, lengths, 1.0)
    torch.testing.assert_close(found.double(), expected(q, k, v, offsets, lengths, 1.0), rtol=0, atol=1e-4)


def test_keys_and_values_may_lie_in_one_wider_buffer() -> None:
    both = torch.randn(50, 2 * 24)
    k, v = both[:, :24], both[:, 24:]
    offsets, lengths = torch.tensor([0, 30, 50], dtype=torch.int32), torch.tensor([30, 11], dtype=torch.int32)
    q = torch.randn(1, 4, 24)
    assert choice(q, k, v).implementation == "cpu"
    found = decode_attention(q, k, v, offsets, lengths, 0.2)
    torch.testing.assert_close(found.double(), expected(q, k, v, offsets, lengths, 0.2), rtol=0, atol=2e-6)
    turned = k.t().contiguous().t()
    assert "not contiguous" in choice(q, turned, v).reason


def test_without_heads_or_texts_there_is_nothing() -> None:
    k = torch.zeros(0, 8)
    none = torch.zeros(0, dtype=torch.int32)
    found = decode_attention(torch.zeros(0, 4, 8), k, k, torch.zeros(1, dtype=torch.int32), none, 1.0)
    assert found.shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(1, 2, 7)}, "give \\(B, H, D\\)"),
        ({"q": torch.zeros(1, 3, 8)}, "2 segments for q \\(1, 3, 8\\)"),
        ({"q": torch.zeros(1, 2, 8).bfloat16()}, "in one type"),
        ({"lengths": torch.tensor([3, 4])}, "give int32"),
        ({"lengths": torch.tensor([3], dtype=torch.int32)}, "give \\(S \\+ 1,\\) and \\(S,\\)"),
        ({"lengths": torch.tensor([6, 1], dtype=torch.int32)}, "segment 0 has 6 tokens and room for 5 of 10"),
        ({"lengths": torch.tensor([-1, 1], dtype=torch.int32)}, "negative"),
        ({"offsets": torch.tensor([0, 5, 99], dtype=torch.int32)}, "of 10 rows"),
        ({"implementation": "triton"}, "Triton"),
    ],
)
def test_wrong_input(change: dict, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given = {
        "q": torch.zeros(1, 2, 8),
        "k": torch.zeros(10, 8),
        "v": torch.zeros(10, 8),
        "offsets": torch.tensor([0, 5, 10], dtype=torch.int32),
        "lengths": torch.tensor([3, 5], dtype=torch.int32),
        "scale": 1.0,
    }
    with pytest.raises(KernelError, match=words):
        decode_attention(**(given | change))


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_tokens_receive_is_added(implementation: str, dtype: torch.dtype) -> None:
    lengths = [600, 0, 1, 256]
    k, v, offsets, counts = cache(lengths, [3, 2, 0, 5], 24, dtype)
    q = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    received = torch.full((len(k),), 0.5)
    plain = decode_attention(q, k, v, offsets, counts, 0.3, implementation=implementation)
    found = decode_attention(q, k, v, offsets, counts, 0.3, received=received, implementation=implementation)
    assert torch.equal(found, plain)
    want = torch.full((len(k),), 0.5, dtype=torch.float64)
    for segment, (begin, length) in enumerate(zip(offsets.tolist(), lengths, strict=False)):
        rows = q.double().reshape(4, 3, 24)[segment]
        want[begin : begin + length] += torch.softmax(
            0.3 * rows @ k[begin : begin + length].double().T, 1
        ).mean(0)
    # Sums of 600 weights in float32.
    torch.testing.assert_close(received.double(), want, rtol=0, atol=1e-6)


def test_what_tokens_receive_must_fit() -> None:
    k, v, offsets, lengths = cache([4], [0], 8, torch.float32)
    q = torch.randn(1, 1, 8)
    for wrong in (torch.zeros(3), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(KernelError, match=r"give \(4,\) float32"):
            decode_attention(q, k, v, offsets, lengths, 1.0, received=wrong)
    with pytest.raises(KernelError, match="`received` is not contiguous"):
        decode_attention(q, k, v, offsets, lengths, 1.0, received=torch.zeros(8)[::2], implementation="cpu")
