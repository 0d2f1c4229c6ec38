"""Packed storage: error bounds, residual tokens exact, and eviction inside blocks."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from cveff.errors import CacheError
from cveff.kv import H2O, KIVI, AdaKV, FastGen, Full, SnapKV, StreamingLLM, compress


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("group", "dim"), [(32, 64), (32, 16), (8, 24)])
def test_round_trip_is_within_half_a_step(bits, group, dim) -> None:
    storage = KIVI(bits=bits, group_size=group)
    x = torch.randn(5, group, dim, generator=torch.Generator().manual_seed(0)) * 3 + 1
    keys = storage.pack_keys(x)
    assert keys.codes.numel() * 8 == x.numel() * bits
    assert keys.scale.shape == (5, 1, dim)
    error = (storage.unpack_keys(keys) - x).abs()
    assert bool((error <= keys.scale / 2 + 1e-6).all())
    values = storage.pack_values(x)
    width = min(group, dim)
    assert values.scale.shape == (5, group, dim // width, 1)
    error = (storage.unpack_values(values) - x).abs().unflatten(-1, (-1, width))
    assert bool((error <= values.scale / 2 + 1e-6).all())


def test_constant_groups_are_exact() -> None:
    storage = KIVI(group_size=8)
    x = torch.full((2, 8, 16), -3.25)
    assert torch.equal(storage.unpack_keys(storage.pack_keys(x)), x)
    assert torch.equal(storage.unpack_values(storage.pack_values(x)), x)


@pytest.mark.parametrize("bits", [2, 4])
def test_residual_tokens_are_exact_and_packed_ones_within_their_steps(bits, family, prompt) -> None:
    model = family("llama")
    ids, _mask = prompt(1, length=100)
    dense = DynamicCache(config=model.config)
    storage = KIVI(bits=bits, group_size=16, residual=20)
    with compress(model, Full(), storage=storage) as cache, torch.no_grad():
        model(ids, past_key_values=dense)
        model(ids, past_key_values=cache)
    keys, values, positions = cache.contents(0, 0, 1)
    assert positions.tolist() == list(range(100))
    assert torch.equal(keys[80:], dense.layers[0].keys[0, 1, 80:])
    assert torch.equal(values[80:], dense.layers[0].values[0, 1, 80:])
    blocks = dense.layers[0].keys[0, 1, :80].unflatten(0, (5, 16))
    step = (blocks.amax(1) - blocks.amin(1)) / (2**bits - 1)
    assert bool(((keys[:80].unflatten(0, (5, 16)) - blocks).abs() <= step[:, None] / 2 + 1e-6).all())
    assert not torch.equal(keys[:80], dense.layers[0].keys[0, 1, :80])


def test_channels_of_outliers_are_why_keys_are_packed_by_channel() -> None:
    keys = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(0))
    keys[..., 7] *= 30  # as the keys of trained models have
    errors = []
    for by in ("channel", "token"):
        storage = KIVI(keys_by=by)
        error = (storage.unpack_keys(storage.pack_keys(keys)) - keys).square().mean((0, 1))
        errors.append(float(error[[*range(7), *range(8, 32)]].mean()))
    assert errors[0] < errors[1] / 20  # by token, the outlier's range is that of its 31 neighbours too


@pytest.mark.parametrize(
    "policy", [Full(), FastGen(recovery=0.7), H2O(0.3, 0.3), SnapKV(0.5, 8), AdaKV(SnapKV(0.5, 8))]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_composes_with_eviction(policy, batch, family, prompt, teacher_forced) -> None:
    """The same tokens are kept as without packing, exactly where no sum of attention decides, and logits stay near."""
    model = family("llama")
    ids, mask = prompt(batch, length=90)
    more = torch.randint(5, 97, (batch, 60), generator=torch.Generator().manual_seed(1))
    storage = KIVI(bits=4, group_size=8, residual=16)
    with compress(model, policy, slack=8) as plain:
        exact = teacher_forced(model, plain, ids, mask, more)
    with compress(model, policy, storage=storage, slack=8) as packed:
        ours = teacher_forced(model, packed, ids, mask, more)
    if policy.kind in ("full", "snapkv", "adakv"):
        # Upper layers see the rounding of lower ones only after the prompt, when these policies have chosen.
        assert packed.kept() == plain.kept()
    assert all(
        abs(a - b) <= 12 for x, y in zip(_flat(packed), _flat(plain), strict=True) for a, b in [(x, y)]
    )
    # 4 bits of a cache of random weights: a wrong token or order shows as errors above 1.
    error = (ours[:, 1:] - exact[:, 1:]).square().mean() / exact[:, 1:].square().mean()
    assert 0 < float(error) < 0.05
    assert packed.live_nbytes < 0.8 * plain.live_nbytes


def _flat(cache) -> list[int]:
    return [length for rows in cache.kept().values() for row in rows for length in row]


def test_blocks_are_freed_when_their_last_token_goes(family, prompt, teacher_forced) -> None:
    model = family("llama")
    ids, mask = prompt(1, length=200)
    more = torch.randint(5, 97, (1, 120), generator=torch.Generator().manual_seed(1))
    with compress(model, H2O(heavy=0, recent=60), storage=KIVI(group_size=8, residual=16), slack=8) as cache:
        teacher_forced(model, cache, ids, mask, more)
    assert set(_flat(cache)) == {60}
    for layer in cache.compressed.values():
        for group in layer.kv.groups:
            held = group.capacity + group._packed.codes[0].numel()
            assert (
                held <= 60 + 8 + 3 * 8
            )  # slack, a block that is partly evicted, tokens since the last layout
    assert cache.contents(0)[2].tolist() == list(range(260, 320))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KIVI(bits=3), "kivi.bits"),
        (lambda: KIVI(group_size=0), "kivi.group_size"),
        (lambda: KIVI(residual=-1), "kivi.residual"),
        (lambda: KIVI(keys_by="head"), "kivi.keys_by"),
        (lambda: KIVI(group_size=24).check(64), "group_size that divides 64"),
        (lambda: KIVI(bits=2).check(10), "do not divide"),
    ],
)
def test_bad_settings(make, message) -> None:
    with pytest.raises(CacheError, match=message):
        make()


def test_streaming_llm_refuses_packed_storage(family) -> None:
    with (
        pytest.raises(CacheError, match="re-rotates"),
        compress(family("llama"), StreamingLLM(), storage=KIVI()),
    ):
        pass
