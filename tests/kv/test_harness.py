"""The harness: figures of a policy on text, needles, growth, pictures."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch.nn import functional as F

from cveff.errors import CacheError
from cveff.kv import H2O, KIVI, FastGen, Full, Random, SnapKV, StreamingLLM, compress
from cveff.kv.budgeted import BUDGETED, policy_of
from cveff.kv.harness import Needle, growth, needles, perplexity, recall
from cveff.kv.harness_picture import heat_map, kept_shares

LINE, LENGTH, PROMPT = 16, 48, 36


@pytest.fixture(scope="module")
def copier():
    """A Llama trained for seconds to repeat a random line from memory: what it needs are tokens far back."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=None,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(130):
        ids = lines(16)
        loss = F.cross_entropy(
            model(ids).logits[:, LINE + 1 : -1].flatten(0, 1), ids[:, LINE + 2 :].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def lines(count: int, length: int = LENGTH) -> torch.Tensor:
    """A random line of 16 tokens, again and again."""
    line = torch.randint(2, 32, (count, LINE))
    return line.repeat(1, math.ceil(length / LINE))[:, :length]


def test_full_perplexity_is_the_models_own(copier) -> None:
    windows = list(lines(3))
    found = perplexity(copier, windows, Full(), prompt=PROMPT)
    with torch.no_grad():
        losses = [
            F.cross_entropy(copier(w[None]).logits[0, PROMPT:-1], w[PROMPT + 1 :], reduction="sum")
            for w in windows
        ]
    assert found.num_tokens == 3 * (LENGTH - PROMPT - 1)
    assert found.perplexity == pytest.approx(math.exp(float(sum(losses)) / found.num_tokens), rel=1e-4)
    assert found.kept == 1
    assert found.labels == {"full": 3 * 2 * 2}
    assert found.removed == pytest.approx(-4 / (2 * 16 * 4))  # positions are a byte count too


def test_perplexity_is_that_of_what_is_kept(copier) -> None:
    windows = list(lines(6))
    full = perplexity(copier, windows, Full(), prompt=PROMPT)
    assert full.perplexity < 2, "the model has not learnt to look back; the comparison would be void"
    # Every token of the last two lines is needed, and nothing else: a window of these loses nothing, one less much.
    enough = perplexity(copier, windows, StreamingLLM(sinks=4, window=2 * LINE - 1), prompt=PROMPT)
    assert enough.perplexity == pytest.approx(full.perplexity, rel=0.05)
    short = perplexity(copier, windows, StreamingLLM(sinks=4, window=LINE // 2), prompt=PROMPT)
    assert short.perplexity > 4 * full.perplexity
    assert short.removed > enough.removed
    for policy in (Random(budget=0.3), FastGen(recovery=0.1)):
        found = perplexity(copier, windows, policy, prompt=PROMPT)
        assert found.kept < 0.7
        assert found.perplexity > 1.5 * full.perplexity
    assert perplexity(copier, windows, FastGen(recovery=1.0), prompt=PROMPT).perplexity == full.perplexity


def test_wrong_positions_after_eviction_are_noticed(copier) -> None:
    window = lines(1)[0]
    losses = []
    for offset in (0, -5):
        with compress(copier, Full()) as cache, torch.no_grad():
            copier(window[None, :PROMPT], past_key_values=cache)
            total = 0.0
            for at in range(PROMPT, LENGTH - 1):
                logits = copier(
                    window[None, at : at + 1],
                    position_ids=torch.tensor([[at + offset]]),
                    past_key_values=cache,
                ).logits
                total += float(F.cross_entropy(logits[0, -1:], window[at + 1 : at + 2]))
        losses.append(total)
    assert losses[1] > losses[0] + 1


def test_needles_are_found_where_they_are_kept(copier) -> None:
    """Here a needle is the next tokens of the line: lost with the line's first saying and second."""
    asked = [Needle(line[:22], line[22:25]) for line in lines(8)]
    full = recall(copier, asked, Full())
    assert full >= 0.75, "the model cannot do it at all; the check would be void"
    assert recall(copier, asked, Full(), storage=KIVI(bits=4, group_size=8, residual=8)) >= 0.5 * full
    assert recall(copier, asked, StreamingLLM(sinks=0, window=4)) < full


class Words:
    """A tokenizer of words and figures."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True):
        pieces = [piece for word in text.split() for piece in (word if word.strip(".").isdigit() else [word])]
        return type("Encoding", (), {"input_ids": [sum(map(ord, piece)) for piece in pieces]})()


def test_needle_prompts_say_the_number_once_and_ask_at_the_end() -> None:
    filler = " ".join(f"word{index}" for index in range(500))
    made = list(needles(Words(), filler, 100, 5))
    for needle in made:
        assert len(needle.prompt) == 100
        assert len(needle.answer) == 5
        windows = needle.prompt.unfold(0, 5, 1)
        assert int((windows == needle.answer).all(1).sum()) == 1
        assert needle.prompt[-4:].tolist() == Words()("The secret number is").input_ids
    assert len({tuple(needle.prompt.tolist()) for needle in made}) == 5
    with pytest.raises(CacheError, match="give more text"):
        next(needles(Words(), "too short", 100, 1))


def test_growth_counts_bytes_by_context(copier) -> None:
    rows = growth(copier, SnapKV(0.5, 4), (24, 48), text=lines(1)[0], new_tokens=4, batch=2)
    assert [row.context for row in rows] == [24, 48]
    assert [row.full_nbytes for row in rows] == [2 * (n + 4) * 2 * 2 * 2 * 16 * 4 for n in (24, 48)]
    assert [row.live_nbytes for row in rows] == [
        2 * (n // 2 + 4) * 2 * 2 * (2 * 16 * 4 + 4) for n in (24, 48)
    ]
    assert all(row.tokens_per_second > 0 for row in rows)
    with pytest.raises(CacheError, match="give more text"):
        growth(copier, Full(), (500,), text=lines(1)[0])


def test_pictures_show_layers_and_heads(copier, tmp_path) -> None:
    with compress(copier, H2O(0.25, 0.25)) as cache, torch.no_grad():
        with pytest.raises(CacheError, match="empty"):
            heat_map(cache, tmp_path / "none.svg")
        copier(lines(2)[:, :32], past_key_values=cache)
    layers, shares = kept_shares(cache)
    assert layers == [0, 1]
    assert shares == [[0.5, 0.5], [0.5, 0.5]]
    heat_map(cache, tmp_path / "kept.svg", title="kept")
    assert ElementTree.parse(tmp_path / "kept.svg").getroot().tag.endswith("svg")
    heat_map(cache, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", BUDGETED)
def test_budgets_are_kept_by_every_policy(name, copier) -> None:
    for budget in (0.5, 24):
        with compress(copier, policy_of(name, budget)) as cache, torch.no_grad():
            copier(lines(1, 64), past_key_values=cache)
        kept = [n for layer in cache.kept().values() for row in layer for n in row]
        wanted = 32 if budget == 0.5 else 24
        # Sinks of a share come on top; a pyramid's layers differ and its mean is rounded.
        assert abs(sum(kept) / len(kept) - wanted) <= (4 if name == "streaming-llm" else 1)


def test_unknown_policies_and_short_windows(copier) -> None:
    with pytest.raises(CacheError, match="'lru'"):
        policy_of("lru")
    with pytest.raises(CacheError, match="give longer ones"):
        perplexity(copier, [torch.arange(5)], Random(), prompt=4)
