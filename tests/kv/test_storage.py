"""Bytes: what is allocated, what is used, and that what was evicted is given back."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from cveff.kv import H2O, KIVI, AdaKV, FastGen, Full, SnapKV, compress


def formula(cache, head_dim: int, itemsize: int = 4) -> int:
    """Keys, values and a position for every token kept; a score where frequent tokens are followed."""
    total = 0
    for index, rows in cache.kept().items():
        for row, labels in zip(rows, cache.labels()[index], strict=True):
            for length, label in zip(row, labels, strict=True):
                scored = label in ("frequent", "local", "h2o")
                total += length * (2 * head_dim * itemsize + 4 + 4 * scored)
    return total


@pytest.mark.parametrize(
    "policy", [Full(), FastGen(recovery=0.6), H2O(), SnapKV(0.5, 8), AdaKV(SnapKV(0.5, 8))]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_are_the_formula(policy, batch, family, prompt) -> None:
    model = family("llama", kv_heads=8, group=1)
    ids, mask = prompt(batch, length=100)
    with compress(model, policy, slack=0) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        assert cache.nbytes == cache.live_nbytes == formula(cache, 8)
    with compress(model, policy, slack=32) as cache:
        model.generate(ids, attention_mask=mask, max_new_tokens=45, past_key_values=cache, do_sample=False)
    assert cache.live_nbytes == formula(cache, 8)
    segments = batch * 8 * 3
    assert cache.live_nbytes < cache.nbytes <= cache.live_nbytes + segments * 2 * 32 * (2 * 8 * 4 + 8)
    assert cache.full_nbytes == sum(int(row.sum()) + 44 for row in mask) * 8 * 3 * 2 * 8 * 4


def held() -> int:
    """Bytes of all tensors that Python knows."""
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) is Tensor
    }
    return sum(storages.values())


def test_evicted_tokens_are_given_back(family, prompt) -> None:
    model = family("llama", kv_heads=8, group=1)
    ids, _mask = prompt(1, length=400)

    def grown_by(policy) -> tuple[int, int]:
        before = held()
        with compress(model, policy, slack=0) as cache, torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
            return held() - before, cache.nbytes

    full, quarter = grown_by(Full()), grown_by(SnapKV(0.25, 16))
    # Nothing but the cache is held after a forward pass: no attention, no dense copy; a few indices, a tag a token.
    assert 0 <= full[0] - full[1] < 1024
    assert 0 <= quarter[0] - quarter[1] < 1024
    assert quarter[1] * 4 == full[1]


def test_appending_happens_in_place(family, prompt) -> None:
    model = family("llama")
    ids, _mask = prompt(1)
    with compress(model, SnapKV(0.5, 8), slack=16) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        group = cache.compressed[0].kv.groups[0]
        where = group._keys.data_ptr()
        for at in range(40, 56):
            model(ids[:, :1], position_ids=torch.tensor([[at]]), past_key_values=cache)
            assert cache.compressed[0].kv.groups[0]._keys.data_ptr() == where
        model(ids[:, :1], position_ids=torch.tensor([[56]]), past_key_values=cache)
    assert cache.compressed[0].kv.groups[0].capacity >= 20 + 17


def test_heads_of_like_length_share_a_group(family, prompt) -> None:
    model = family("llama", kv_heads=8, group=1)
    ids, _mask = prompt(1, length=300)
    with compress(model, AdaKV(SnapKV(0.3, 8)), slack=8) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
    for layer in cache.compressed.values():
        for group in layer.kv.groups:
            assert max(group.lengths) - min(group.lengths) <= 8
        assert sorted(index for group in layer.kv.groups for index in group.indices) == list(range(8))
        assert len(layer.kv.groups) > 1


def test_sliding_layers_are_left_to_their_windows(family, prompt) -> None:
    model = family("gemma3")
    ids, _mask = prompt(1, length=100)
    with compress(model, H2O(heavy=5, recent=5), slack=0) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
    assert sorted(cache.compressed) == [0, 2]
    assert cache.layers[1].keys.shape[2] == 15
    assert cache.sliding_nbytes == 2 * 15 * 2 * 8 * 4
    assert cache.live_nbytes == 2 * 2 * 10 * (2 * 8 * 4 + 8) + cache.sliding_nbytes


def test_a_reset_cache_takes_another_batch(family, prompt) -> None:
    model = family("llama")
    with compress(model, FastGen(recovery=0.8)) as cache, torch.no_grad():
        model(prompt(1)[0], past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.nbytes == 0
        model(prompt(3)[0], past_key_values=cache)
        assert len(cache.kept()[0]) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stored_as_such(dtype, family, prompt) -> None:
    model = family("llama").to(dtype)
    ids, mask = prompt(2)
    with compress(model, H2O(0.3, 0.3), slack=0) as cache:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=10, do_sample=False, past_key_values=cache
        )
    assert out.shape == (2, 50)
    assert cache.contents(0)[0].dtype == dtype
    assert cache.live_nbytes == formula(cache, 8, itemsize=2)


def test_packed_storage_of_half_precision_counts_its_scales(family, prompt) -> None:
    model = family("llama", kv_heads=2, group=1)
    ids, _mask = prompt(1, length=96)
    with compress(model, Full(), storage=KIVI(group_size=32, residual=32), slack=0) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
    packed = 64 * (2 * 8 // 2) + 2 * 8 * 2 * 4 + 64 * 2 * 4  # codes; scales and zeros of keys, of values
    assert cache.nbytes == cache.live_nbytes == 3 * 2 * (packed + 64 * 4 + 32 * (2 * 8 * 4 + 4))
