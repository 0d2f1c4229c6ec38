"""Every family, batch and policy: a ragged cache gives what a dense one with a mask for every head gives."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cveff.kv import H2O, KIVI, AdaKV, FastGen, Full, PyramidKV, Random, SnapKV, StreamingLLM, compress

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "phi", "opt")
EVICTING = (
    FastGen(recovery=0.6),
    H2O(heavy=0.2, recent=0.2),
    SnapKV(budget=0.5, window=8),
    PyramidKV(budget=0.5, window=8),
    AdaKV(SnapKV(budget=0.5, window=8)),
    Random(budget=0.5),
)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_recovery_of_one_generates_what_the_full_cache_does(name, batch, family, prompt) -> None:
    model = family(name, layers=2)
    ids, mask = prompt(batch)
    arguments = {"attention_mask": mask, "max_new_tokens": 64, "do_sample": False, "output_logits": True}
    dense = DynamicCache(config=model.config)
    full = model.generate(ids, **arguments, return_dict_in_generate=True, past_key_values=dense)
    with compress(model, FastGen(recovery=1.0)) as cache:
        ours = model.generate(ids, **arguments, return_dict_in_generate=True, past_key_values=cache)
    assert torch.equal(ours.sequences, full.sequences)
    # Other layouts add up in another order; 1e-4 is far above that and far below a token too many or too few.
    assert torch.allclose(torch.stack(ours.logits), torch.stack(full.logits), atol=1e-4)
    assert {label for rows in cache.labels().values() for row in rows for label in row} == {"full"}
    assert model.config._attn_implementation == "sdpa"
    for index in cache.compressed:
        for row in range(batch):
            padding = int((mask[row] == 0).sum())
            keys, values, positions = cache.contents(index, row, 0)
            assert positions.tolist() == list(range(dense.layers[index].keys.shape[2] - padding))
            if index == min(cache.compressed) and name != "gemma3" and batch == 1:
                assert torch.equal(keys, dense.layers[index].keys[row, 0, padding:])
                assert torch.equal(values, dense.layers[index].values[row, 0, padding:])


SHAPES = [
    ("llama", 1, 4, 3),
    ("llama", 8, 1, 3),
    ("llama", 2, 4, 1),
    ("qwen2", 8, 4, 1),
    ("qwen3", 2, 4, 3),
    ("gemma3", 1, 4, 3),
    ("gemma3", 2, 1, 1),
    ("phi", 8, 1, 3),
    ("opt", 2, 1, 3),
]


@pytest.mark.parametrize(
    ("policy", "name", "kv_heads", "group", "batch"),
    # Policies that evict once differ by what they keep, and not by how: one shape each is enough for them.
    [(EVICTING[0], *shape) for shape in SHAPES]
    + [(EVICTING[1], *shape) for shape in SHAPES[1:6:2]]
    + [(policy, *shape) for policy, shape in zip(EVICTING[2:], SHAPES[1:5], strict=True)],
    ids=lambda value: getattr(value, "kind", None),
)
def test_ragged_equals_masked_through_50_steps(
    policy, name, kv_heads, group, batch, family, prompt, teacher_forced, masked_attention
) -> None:
    model = family(name, kv_heads, group, layers=2)
    ids, mask = prompt(batch)
    more = torch.randint(5, 97, (batch, 50), generator=torch.Generator().manual_seed(1))
    kept: list[dict[int, list[list[list[int]]]]] = []

    def note() -> None:
        heads = {index: len(rows[0]) for index, rows in cache.kept().items()}
        kept.append(
            {
                index: [
                    [cache.contents(index, row, head)[2].tolist() for head in range(heads[index])]
                    for row in range(batch)
                ]
                for index in cache.compressed
            }
        )

    with compress(model, policy, slack=4) as cache:
        ours = teacher_forced(model, cache, ids, mask, more, after=note)
    AttentionInterface.register("test_masked", masked_attention(kept, mask))
    AttentionMaskInterface.register(
        "test_masked", lambda **arguments: sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    )
    model.config._attn_implementation = "test_masked"
    theirs = teacher_forced(model, DynamicCache(config=model.config), ids, mask, more)
    assert torch.allclose(ours, theirs, atol=1e-4)
    total = sum(
        len(kept[-1][index][row][head])
        for index in kept[-1]
        for row in range(batch)
        for head in range(len(kept[-1][index][row]))
    )
    seen = sum(int(mask[row].sum()) + 50 for row in range(batch))
    assert total < seen * sum(len(kept[-1][index][0]) for index in kept[-1]), "nothing was evicted"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_second_prompt_is_appended_with_its_padding_left_out(batch, family, prompt) -> None:
    model = family("llama")
    ids, mask = prompt(batch)
    more, more_mask = prompt(batch, length=20, seed=3)
    both = torch.cat([mask, more_mask], dim=1)
    positions = (both.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(torch.cat([ids, more], dim=1), attention_mask=both, position_ids=positions).logits
        for policy in (Full(), H2O(heavy=400, recent=200)):
            with compress(model, policy) as cache:
                model(ids, attention_mask=mask, position_ids=positions[:, :40], past_key_values=cache)
                late = model(
                    more, attention_mask=both, position_ids=positions[:, 40:], past_key_values=cache
                ).logits
            real = more_mask.bool()
            assert torch.allclose(late[real], whole[:, 40:][real], atol=1e-4)
            assert cache.kept()[0] == [[int(row.sum())] * 2 for row in both]


def test_positions_go_on_after_eviction_and_a_wrong_offset_shows(family, prompt, teacher_forced) -> None:
    model = family("llama")
    ids, mask = prompt()
    seen: list[int] = []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    with compress(model, H2O(heavy=4, recent=4)) as cache:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=False, past_key_values=cache
        )
    hook.remove()
    assert out.shape[1] == 60
    assert seen == list(range(59))
    assert cache.get_seq_length() == 59
    assert cache.get_mask_sizes(1, 0) == (9, 51)
    assert {length for rows in cache.kept().values() for row in rows for length in row} == {8}


def test_sampling_is_reproducible_and_returns_several_sequences(family, prompt) -> None:
    model = family("qwen2")
    ids, mask = prompt(2)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        with compress(model, FastGen(recovery=0.7)) as cache:
            found.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=12,
                    do_sample=True,
                    top_p=0.9,
                    num_return_sequences=2,
                    past_key_values=cache,
                )
            )
    assert found[0].shape == (4, 52)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "phi", "gemma3", "qwen3"])
def test_streaming_llm_is_the_model_run_on_sinks_and_window_alone(
    name, family, prompt, teacher_forced
) -> None:
    """In a model of one layer keys do not depend on what was evicted, so the paper's positions can be recomputed."""
    model = family(name, layers=1)
    ids, mask = prompt(length=30)
    more = torch.randint(5, 97, (1, 25), generator=torch.Generator().manual_seed(1))
    with compress(model, StreamingLLM(sinks=4, window=10)) as cache:
        ours = teacher_forced(model, cache, ids, mask, more)
    text = torch.cat([ids, more], dim=1)
    for step in range(1, 26):
        end = 30 + step
        alone = torch.cat([text[:, :4], text[:, end - 11 : end]], dim=1)
        with torch.no_grad():
            expected = model(alone).logits[:, -1]
        assert torch.allclose(ours[:, step], expected, atol=1e-4), step
    assert cache.kept() == {0: [[14] * len(cache.kept()[0][0])]}


def test_packed_storage_of_everything_recent_changes_nothing(family, prompt) -> None:
    model = family("llama")
    ids, mask = prompt(3)
    arguments = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    with compress(model, H2O(heavy=0.3, recent=0.3)) as cache:
        plain = model.generate(ids, **arguments, past_key_values=cache)
    with compress(model, H2O(heavy=0.3, recent=0.3), storage=KIVI(residual=512, group_size=8)) as cache:
        packed = model.generate(ids, **arguments, past_key_values=cache)
    assert torch.equal(plain, packed)
