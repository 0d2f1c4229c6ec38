"""The same caches in decoders that see images and in a decoder that draws them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor
from transformers import DynamicCache

from cveff.kv import H2O, AdaKV, FastGen, Full, ImagePrefix, SnapKV, compress

IMAGE = 90
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def gemma() -> Any:
    text = {
        **TEXT,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 64,
        "query_pre_attn_scalar": 8,
    }
    config = t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**text).to_dict(),
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=91,
        eoi_token_index=92,
    )
    return t.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    config = t.LlavaConfig(
        text_config=t.LlamaConfig(**TEXT).to_dict(),
        vision_config=t.CLIPVisionConfig(**VISION, projection_dim=16).to_dict(),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return t.LlavaForConditionalGeneration(config)


def inputs(batch: int) -> dict[str, Tensor]:
    """<bos>, some text, 16 image tokens, a question; the second sequence has padding and an image of its own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 80, (batch, 50), generator=generator)
    ids[:, 0] = 1
    ids[:, 20:36] = IMAGE
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : 5 * row] = 0
        mask[row, : 5 * row] = 0
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def make(build: Any) -> Any:
    torch.manual_seed(0)
    model = build()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)
    return model.eval()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("build", [gemma, llava])
def test_a_full_cache_generates_what_the_model_does(build, batch) -> None:
    model, given = make(build), inputs(batch)
    if build is gemma:
        given["token_type_ids"] = (given["input_ids"] == IMAGE).long()
    arguments = {
        **given,
        "max_new_tokens": 20,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    text = model.config.get_text_config()
    full = model.generate(**arguments, past_key_values=DynamicCache(config=text))
    with compress(model, FastGen(recovery=1.0)) as cache:
        ours = model.generate(**arguments, past_key_values=cache)
    assert torch.equal(full.sequences, ours.sequences)
    assert torch.allclose(torch.stack(full.logits), torch.stack(ours.logits), atol=1e-4)
    assert cache.full_nbytes == cache.sliding_nbytes + sum(
        (int(row.sum()) + 19) * 2 * 2 * 8 * 4 * len(cache.compressed) for row in given["attention_mask"]
    )


@pytest.mark.parametrize("build", [gemma, llava])
def test_image_tokens_are_evicted_and_text_stays(build) -> None:
    model, given = make(build), inputs(2)
    if build is gemma:
        given["token_type_ids"] = (given["input_ids"] == IMAGE).long()
    with compress(model, ImagePrefix(ratio=0.25)) as cache:
        model.generate(**given, max_new_tokens=5, do_sample=False, past_key_values=cache)
    for row in range(2):
        real = given["attention_mask"][row].bool()
        ids = given["input_ids"][row][real]
        for index in cache.compressed:
            for head in range(2):
                positions = cache.contents(index, row, head)[2].tolist()
                text = (ids != IMAGE).nonzero()[:, 0].tolist()
                assert set(text) <= set(positions)
                assert len(positions) == len(text) + 4 + 4


def test_image_tokens_see_each_other_and_are_counted_so() -> None:
    """Gemma's mask inside an image is no causal one; profiling must use the model's."""
    model, given = make(gemma), inputs(1)
    given["token_type_ids"] = (given["input_ids"] == IMAGE).long()
    seen: list[Any] = []

    class Watch(Full):
        def select(self, prompt: Any) -> Any:
            seen.append(prompt)
            return super().select(prompt)

    with compress(model, Watch()) as cache, torch.no_grad():
        model(**given, past_key_values=cache)
    (prompt,) = seen
    assert prompt.mask is not None
    assert bool(prompt.mask[20:36, 20:36].all())
    assert not bool(prompt.mask[:20, 20:].any())
    assert torch.equal((prompt.tags == 4), given["input_ids"][0] == IMAGE)


@pytest.mark.parametrize(
    "policy", [FastGen(recovery=0.7), H2O(0.2, 0.2), SnapKV(0.4, 8), AdaKV(SnapKV(0.4, 8))]
)
def test_a_decoder_of_image_tokens_draws_with_any_policy(policy) -> None:
    """A Llama over the codes of 8 × 8 patches after a class token, the design of LlamaGen (arXiv:2406.06525)."""
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**{**TEXT, "vocab_size": 128 + 10})).eval()
    model.generation_config.eos_token_id = None
    rows = torch.randint(0, 128, (3, 32), generator=torch.Generator().manual_seed(1))
    half = torch.cat([torch.tensor([[130], [131], [132]]), rows], dim=1)  # a class and the upper half
    with compress(model, policy) as cache:
        out = model.generate(
            half, max_new_tokens=32, min_new_tokens=32, do_sample=True, past_key_values=cache
        )
    assert out.shape == (3, 1 + 64)
    kept = [n for layer in cache.kept().values() for row in layer for n in row]
    assert min(kept) > 0 and max(kept) < 64 and sum(kept) < len(kept) * 60
    with compress(model, Full()) as cache:
        drawn = model.generate(half, max_new_tokens=32, do_sample=False, past_key_values=cache)
    assert torch.equal(drawn, model.generate(half, max_new_tokens=32, do_sample=False))
