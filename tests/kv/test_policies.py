"""What each policy keeps of a prompt, by the papers' definitions, and that short prompts are left whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cveff.errors import CacheError
from cveff.kv import (
    H2O,
    AdaKV,
    FastGen,
    Full,
    ImagePrefix,
    Prompt,
    PyramidKV,
    Random,
    SnapKV,
    StreamingLLM,
    compress,
)
from cveff.kv.marks import IMAGE


def make_prompt(heads: int = 4, group: int = 2, length: int = 200, **changes: Any) -> Prompt:
    generator = torch.Generator().manual_seed(0)
    sharpness = torch.logspace(-1, 0.7, heads)[:, None, None, None]
    given = {
        "queries": torch.randn(heads, group, length, 16, generator=generator) * sharpness,
        "keys": torch.randn(heads, length, 16, generator=generator),
        "values": torch.randn(heads, length, 16, generator=generator),
        "scale": 0.25,
        "mask": None,
        "tags": torch.zeros(length, dtype=torch.uint8),
        "layer": 0,
        "num_layers": 1,
        "row": 0,
    }
    return Prompt(**{**given, **changes})


def attention(prompt: Prompt) -> Tensor:
    logits = prompt.queries @ prompt.keys[:, None].transpose(2, 3) * prompt.scale
    return logits.masked_fill(torch.ones_like(logits[0, 0]).tril() == 0, -torch.inf).softmax(-1)


def kept(policy: Any, prompt: Prompt, head: int = 0) -> set[int]:
    return set(policy.select(prompt).keep[head].nonzero()[:, 0].tolist())


def test_h2o_keeps_recent_tokens_and_the_heaviest_of_the_others() -> None:
    prompt = make_prompt()
    received = attention(prompt).mean(1).sum(1)
    for head in range(4):
        heavy = received[head, :170].topk(20).indices.tolist()
        assert kept(H2O(heavy=0.1, recent=30), prompt, head) == set(heavy) | set(range(170, 200))


def test_streaming_llm_keeps_sinks_and_a_window() -> None:
    assert kept(StreamingLLM(sinks=3, window=0.1), make_prompt()) == {0, 1, 2, *range(180, 200)}


def snap_scores(prompt: Prompt, window: int, kernel: int) -> Tensor:
    begin = prompt.num_tokens - window
    mean = attention(prompt)[:, :, begin:, :begin].mean((1, 2))
    return F.avg_pool1d(mean[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]


def test_snapkv_keeps_what_its_window_looks_at() -> None:
    prompt = make_prompt()
    scores = snap_scores(prompt, 16, 5)
    for head in range(4):
        best = scores[head].topk(60 - 16).indices.tolist()
        assert kept(SnapKV(budget=60, window=16), prompt, head) == set(best) | set(range(184, 200))


@pytest.mark.parametrize("budget", [200, 1.0, 5000])
def test_a_prompt_within_the_budget_is_left_whole(budget) -> None:
    for policy in (SnapKV(budget), PyramidKV(budget), AdaKV(SnapKV(budget)), Random(budget)):
        assert bool(policy.select(make_prompt()).keep.all()), policy


@pytest.mark.parametrize("length", [100, 400])
def test_pyramid_budgets_fall_and_keep_their_mean(length) -> None:
    counts = [
        int(
            PyramidKV(budget=60, window=16)
            .select(make_prompt(length=length, layer=layer, num_layers=5))
            .keep[0]
            .sum()
        )
        for layer in range(5)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert abs(sum(counts) / 5 - 60) <= 0.5  # each is rounded
    assert max(counts) <= length


def test_ada_kv_gives_sharp_heads_less_and_every_head_its_floor() -> None:
    prompt = make_prompt()
    selection = AdaKV(SnapKV(budget=60, window=16), floor=0.3).select(prompt)
    counts = selection.keep.sum(1).tolist()
    assert sum(counts) == 4 * 60
    assert min(counts) >= 18
    assert len(set(counts)) > 1
    scores = snap_scores(prompt, 16, 5)
    outside = [scores[h][~selection.keep[h, :184]].max() for h in range(4) if counts[h] < 200]
    inside = [scores[h][selection.keep[h, :184]].min() for h in range(4) if counts[h] > 18]
    assert max(outside) <= min(inside)


def test_random_tokens_differ_by_layer_row_and_seed_and_repeat() -> None:
    found = [
        kept(Random(0.5, seed=seed), make_prompt(layer=layer, row=row))
        for seed, layer, row in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert found[0] == found[1]
    assert all(found[0] != other for other in found[2:])
    assert {len(keep) for keep in found} == {100}


def test_image_prefix_keeps_text_and_what_it_asks_about() -> None:
    tags = torch.zeros(200, dtype=torch.uint8)
    tags[10:110] = IMAGE
    prompt = make_prompt(tags=tags)
    received = attention(prompt).mean(1)[:, 110:].sum(1)
    for head in range(4):
        best = (received[head, 10:110].topk(25).indices + 10).tolist()
        assert kept(ImagePrefix(0.25), prompt, head) == {*range(10), *best, *range(110, 200)}
    assert bool(ImagePrefix(0.25).select(make_prompt()).keep.all())
    tags[110:] = IMAGE
    with pytest.raises(CacheError, match="no text after"):
        ImagePrefix(0.25).select(make_prompt(tags=tags))


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize(
    "policy",
    [
        FastGen(recovery=0.5),
        H2O(),
        StreamingLLM(sinks=4),
        SnapKV(),
        PyramidKV(),
        AdaKV(),
        Random(),
        ImagePrefix(),
        Full(),
    ],
    ids=lambda policy: policy.kind,
)
def test_prompts_shorter_than_the_special_set_generate(policy, length, family, prompt) -> None:
    model = family("llama")
    ids, mask = prompt(2, length=20)
    ids, mask = ids[:, -length:], mask[:, -length:]
    with compress(model, policy) as cache:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, past_key_values=cache
        )
    assert out.shape == (2, length + 8)
    assert all(0 <= n <= length + 7 for rows in cache.kept().values() for row in rows for n in row)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: H2O(heavy=-1), "h2o.heavy"),
        (lambda: H2O(recent=0), "h2o.recent"),
        (lambda: H2O(heavy=1.5), "h2o.heavy"),
        (lambda: H2O(heavy="many"), "h2o.heavy"),
        (lambda: StreamingLLM(sinks=-1), "streaming_llm.sinks"),
        (lambda: StreamingLLM(window=0.0), "streaming_llm.window"),
        (lambda: SnapKV(budget=0), "snapkv.budget"),
        (lambda: SnapKV(budget=True), "snapkv.budget"),
        (lambda: SnapKV(kernel=4), "snapkv.kernel"),
        (lambda: SnapKV(window=0), "snapkv.window"),
        (lambda: PyramidKV(beta=0), "pyramidkv.beta"),
        (lambda: AdaKV(floor=1.1), "adakv.floor"),
        (lambda: Random(seed=-1), "random.seed"),
        (lambda: ImagePrefix(ratio=0), "image_prefix.ratio"),
    ],
)
def test_settings_out_of_range(make, name) -> None:
    with pytest.raises(CacheError, match=name):
        make()
