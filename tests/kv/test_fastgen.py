"""FastGen against an n × n oracle: what it recovers, what it costs, and that it falls back on everything."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from cveff.errors import CacheError
from cveff.kv import FastGen, Prompt, compress
from cveff.kv.marks import IMAGE, PUNCTUATION, SPECIAL, Marks

MARKS = Marks(special=frozenset({1}), punctuation=frozenset(range(5, 15)))


def random_prompt(heads: int = 3, group: int = 2, length: int = 300, seed: int = 0, **changes: Any) -> Prompt:
    """Heads of different sharpness: some look everywhere, some at a few tokens."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.logspace(-1, 1.3, heads)[:, None, None, None]
    tags = torch.zeros(length, dtype=torch.uint8)
    tags[0] = SPECIAL
    tags[5::9] = PUNCTUATION
    keys = torch.randn(heads, length, 16, generator=generator)
    keys[0, 5::9] += 2  # a head that likes punctuation
    given = {
        "queries": torch.randn(heads, group, length, 16, generator=generator) * sharpness
        + (keys[0, 5] * 0.5),
        "keys": keys,
        "values": torch.randn(heads, length, 16, generator=generator),
        "scale": 0.25,
        "mask": None,
        "tags": tags,
        "layer": 0,
        "num_layers": 1,
        "row": 0,
    }
    return Prompt(**{**given, **changes})


def attention(prompt: Prompt) -> Tensor:
    """(H, g, n, n), all at once."""
    logits = prompt.queries @ prompt.keys[:, None].transpose(2, 3) * prompt.scale
    mask = torch.ones_like(logits[0, 0], dtype=torch.bool).tril() if prompt.mask is None else prompt.mask
    return logits.masked_fill(~mask, -torch.inf).softmax(-1)


def recovered(prompt: Prompt, label: str, r: float = 0.3) -> Tensor:
    """Attention mass that a set keeps, (H, g, n), row by row, by loops over its definition."""
    full = attention(prompt)
    n = prompt.num_tokens
    received = full.mean(1).sum(1)
    out = torch.zeros(full.shape[:3])
    special = (prompt.tags & SPECIAL) != 0
    fixed = special if label == "special" else special | ((prompt.tags & PUNCTUATION) != 0)
    for head in range(prompt.num_heads):
        keep = fixed.clone()
        if label in ("frequent", "local"):
            keep[received[head].argsort(descending=True)[: int(r * n)]] = True
        for row in range(n):
            near = (
                torch.arange(n) > row - int(r * n) if label == "local" else torch.zeros(n, dtype=torch.bool)
            )
            out[head, :, row] = full[head, :, row, keep | near].sum(-1)
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("recovery", [0.2, 0.5, 0.7, 0.9, 0.99])
def test_every_head_recovers_what_was_asked_and_no_cheaper_set_would(recovery, seed) -> None:
    prompt = random_prompt(seed=seed)
    chosen = FastGen(recovery=recovery).select(prompt)
    every = {
        label: recovered(prompt, label).mean(-1).amin(-1)
        for label in ("special", "punctuation", "frequent", "local")
    }
    costs = {label: _cost(prompt, label) for label in every}
    for head, label in enumerate(chosen.labels):
        if label != "full":
            assert every[label][head] >= recovery
            assert int(chosen.keep[head].sum()) == costs[label][head]
        cheaper = [other for other in every if costs[other][head] < int(chosen.keep[head].sum())]
        assert all(every[other][head] < recovery for other in cheaper)


def _cost(prompt: Prompt, label: str, r: float = 0.3) -> Tensor:
    n = prompt.num_tokens
    received = attention(prompt).mean(1).sum(1)
    keep = (prompt.tags & (SPECIAL if label == "special" else SPECIAL | PUNCTUATION)) != 0
    keep = keep.repeat(prompt.num_heads, 1)
    if label in ("frequent", "local"):
        keep.scatter_(1, received.topk(int(r * n)).indices, True)
    if label == "local":
        keep[:, n - int(r * n) :] = True
    return keep.sum(1)


def test_kept_tokens_fall_with_the_recovery() -> None:
    prompt = random_prompt(heads=8)
    counts = [
        FastGen(recovery=t).select(prompt).keep.sum(1) for t in (0.05, 0.3, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0)
    ]
    assert all(bool((low <= high).all()) for low, high in itertools.pairwise(counts))
    assert counts[-1].tolist() == [300] * 8
    assert int(counts[0].sum()) < int(counts[-1].sum())


def test_column_sums_and_chunks_equal_the_whole_matrix() -> None:
    prompt = random_prompt(length=301)
    assert torch.allclose(prompt.received(), attention(prompt).mean(1).sum(1), atol=1e-4)
    found = torch.zeros(3, 2, 301, 301)
    for first, last, rows in prompt.attention():
        assert rows.shape[2] <= 128
        found[:, :, first:last, : rows.shape[-1]] = rows
    assert torch.allclose(found, attention(prompt), atol=1e-6)


def test_full_is_the_last_resort_even_where_rounding_would_miss_it() -> None:
    prompt = random_prompt()
    chosen = FastGen(recovery=1.0).select(prompt)
    assert chosen.labels == ("full",) * 3
    assert bool(chosen.keep.all())
    assert FastGen(recovery=1.0 - 1e-9).select(prompt).labels == ("full",) * 3


@pytest.mark.parametrize("reduce", ["min", "last"])
def test_other_reductions_are_what_they_say(reduce) -> None:
    prompt = random_prompt()
    mass = recovered(prompt, "local")
    value = mass.amin(-1).amin(-1) if reduce == "min" else mass[..., -16:].mean(-1).amin(-1)
    head = int(value.argmax())
    just_below, just_above = float(value[head]) - 1e-4, float(value[head]) + 1e-4
    settings = {"reduce": reduce, "num_last": 16}
    assert FastGen(recovery=just_below, **settings).select(prompt).labels[head] != "full"
    if recovered(prompt, "frequent").mean(-1).amin(-1)[head] < value[head]:
        assert FastGen(recovery=just_above, **settings).select(prompt).labels[head] == "full"


def test_image_tokens_are_profiled_by_the_text_that_asks() -> None:
    length = 200
    tags = torch.zeros(length, dtype=torch.uint8)
    tags[0], tags[10:150] = SPECIAL, IMAGE
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[10:150, 10:150] = True
    prompt = random_prompt(length=length, tags=tags, mask=mask)
    keys = prompt.keys.clone()
    keys[:, 20:25] = prompt.queries[:, 0, 150:].mean(1, keepdim=True) * 6
    prompt = random_prompt(length=length, tags=tags, mask=mask, keys=keys)
    chosen = FastGen(recovery=0.05, frequent=0.0, local=0.0, image=0.05).select(prompt)
    assert set(chosen.labels) <= {"special", "image", "full"}
    assert "image" in chosen.labels
    full = attention(prompt)
    for head, label in enumerate(chosen.labels):
        if label == "image":
            asked = full.mean(1)[head, (tags & IMAGE) == 0].sum(0).masked_fill((tags & IMAGE) == 0, -1)
            assert set(asked.topk(7).indices.tolist()) <= set(chosen.keep[head].nonzero()[:, 0].tolist())


def test_budgets_follow_the_current_length_and_generated_punctuation_stays(
    family, prompt, teacher_forced
) -> None:
    model = family("llama")
    ids, mask = prompt()
    more = torch.full((1, 50), 60)
    more[0, 10] = 7  # punctuation by MARKS
    # Nothing but these sets: recovery is small enough for the first one that has a token.
    with compress(model, FastGen(recovery=0.01, frequent=0.0, local=0.0), marks=MARKS) as cache:
        teacher_forced(model, cache, ids, mask, more)
    marked = [
        i
        for i, t in enumerate(torch.cat([ids, more], 1)[0].tolist())
        if t in MARKS.special | MARKS.punctuation
    ]
    for index, rows in cache.labels().items():
        for head, label in enumerate(rows[0]):
            positions = cache.contents(index, 0, head)[2].tolist()
            assert label in ("special", "punctuation")
            assert positions == ([0] if label == "special" else marked)
    assert 50 in marked


def test_local_and_frequent_grow_with_the_text(family, prompt, teacher_forced) -> None:
    model = family("llama")
    ids, mask = prompt()
    more = torch.randint(20, 97, (1, 50), generator=torch.Generator().manual_seed(1))
    kept = []
    with compress(model, FastGen(recovery=0.3), marks=Marks()) as cache:
        teacher_forced(model, cache, ids, mask, more, after=lambda: kept.append(cache.kept()))
    for index, rows in cache.labels().items():
        for head, label in enumerate(rows[0]):
            final = kept[-1][index][0][head]
            if label == "frequent":
                assert final == int(0.3 * 90)
            if label == "local":
                assert int(0.3 * 90) <= final <= 2 * int(0.3 * 90)
                assert set(range(90 - 27, 90)) <= set(cache.contents(index, 0, head)[2].tolist())
    assert {label for rows in cache.labels().values() for label in rows[0]} & {"frequent", "local"}


@pytest.mark.parametrize("recovery", [0, -0.1, 1.01, float("nan")])
def test_recovery_out_of_range(recovery) -> None:
    with pytest.raises(CacheError, match=r"fastgen\.recovery"):
        FastGen(recovery=recovery)


@pytest.mark.parametrize(
    "settings",
    [{"frequent": -0.1}, {"local": 1.5}, {"reduce": "max"}, {"num_last": 0}, {"max_length": 0}, {"image": 2}],
)
def test_other_settings_out_of_range(settings) -> None:
    with pytest.raises(CacheError, match=f"fastgen.{next(iter(settings))}"):
        FastGen(**settings)
