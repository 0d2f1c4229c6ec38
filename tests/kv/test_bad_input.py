"""What cannot be compressed says so, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from cveff.errors import CacheError
from cveff.kv import H2O, FastGen, Full, Marks, SnapKV, StreamingLLM, compress
from cveff.kv.marks import marks_of


class Tokenizer:
    """As much of one as is asked for."""

    all_special_ids = (0, 1)

    def __init__(self, *words: str) -> None:
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index + 2 for index, word in enumerate(self._words)}


def test_a_tokenizer_without_punctuation(family) -> None:
    with pytest.raises(CacheError, match="no token of punctuation among 2"):
        with compress(family("llama"), FastGen(), tokenizer=Tokenizer("a", "▁b")):
            pass


def test_punctuation_is_what_unicode_says(family) -> None:
    marks = marks_of(family("llama"), Tokenizer("a", "▁.", "Ġ?!", "。", "+", "a.", "\u2581"))
    assert marks.punctuation == {3, 4, 5}
    assert marks.special == {0, 1}


def test_without_a_tokenizer_the_cache_says_what_is_missing(family) -> None:
    with compress(family("llama"), FastGen()) as cache:
        assert cache.notes == ("no tokenizer was given: no token counts as punctuation",)
        assert cache.marks == Marks(special=frozenset({0, 1}))


def test_beam_search(family, prompt) -> None:
    model = family("llama")
    ids, mask = prompt()
    with compress(model, H2O()) as cache, pytest.raises(CacheError, match="beam search"):
        model.generate(
            ids, attention_mask=mask, num_beams=2, max_new_tokens=4, past_key_values=cache, do_sample=False
        )


def test_cropping_and_assisted_generation(family, prompt) -> None:
    model = family("llama")
    ids, _mask = prompt()
    with compress(model, H2O()) as cache:
        assert not cache.is_croppable
        with torch.no_grad():
            model(ids, past_key_values=cache)
        for call in (
            lambda: cache.crop(-1),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.batch_select_indices(torch.tensor([0])),
            lambda: cache.reorder_cache(torch.tensor([0])),
            lambda: cache.layers[0].offload(),
        ):
            with pytest.raises(CacheError):
                call()
    with compress(model, H2O()) as cache, pytest.raises((CacheError, ValueError)):
        model.generate(ids, assistant_model=copy.deepcopy(model), max_new_tokens=8, past_key_values=cache)


def test_static_caches(family, prompt) -> None:
    model = family("llama")
    ids, _mask = prompt()
    model.generation_config.cache_implementation = "static"
    with pytest.raises(CacheError, match="'static' cache"), compress(model, Full()):
        pass
    model.generation_config.cache_implementation = None
    with compress(model, Full()) as cache, pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, cache_implementation="static", past_key_values=cache, max_new_tokens=4)
    # A cache of another kind is none of ours: the model runs as ever.
    static = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        expected = model(ids).logits
        with compress(model, H2O(heavy=2, recent=2)):
            assert torch.allclose(model(ids, past_key_values=static).logits, expected, atol=1e-4)


def test_models_whose_layers_all_slide() -> None:
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=8,
        )
    )  # fmt: skip
    with (
        pytest.raises(CacheError, match="all 2 layers attend within a sliding window"),
        compress(model, H2O()),
    ):
        pass


def test_other_attention_implementations(family) -> None:
    model = family("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(CacheError, match="attn_implementation='sdpa'"), compress(model, H2O()):
        pass
    assert model.config._attn_implementation == "flash_attention_2"


def test_eager_models_are_given_back_eager(family, prompt) -> None:
    model = family("llama")
    model.set_attn_implementation("eager")
    ids, _mask = prompt()
    with torch.no_grad():
        expected = model(ids).logits
        with compress(model, Full()) as cache:
            assert torch.allclose(model(ids, past_key_values=cache).logits, expected, atol=1e-4)
    assert model.config._attn_implementation == "eager"


def test_encoders_with_decoders_and_other_modules() -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(CacheError, match="encoder with a decoder"), compress(t5, H2O()):
        pass
    with pytest.raises(CacheError, match="no transformers model"), compress(torch.nn.Linear(2, 2), H2O()):
        pass


def test_another_dtype_or_batch_than_the_prompts(family, prompt) -> None:
    model = family("llama")
    ids, _ = prompt(2)
    with compress(model, H2O()) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(CacheError, match="is given"):
            model(ids[:1, :1], past_key_values=cache)
        with pytest.raises(CacheError, match=r"torch.float32.*torch.bfloat16"):
            model.to(torch.bfloat16)(ids[:, :1], past_key_values=cache)


def test_after_the_block_and_with_gradients(family, prompt) -> None:
    model = family("llama")
    ids, _ = prompt()
    with compress(model, H2O()) as cache:
        with pytest.raises(CacheError, match="no_grad"):
            model(ids, past_key_values=cache)
        cache.reset()
        with torch.no_grad():
            model(ids, past_key_values=cache)
    figures = cache.nbytes, cache.live_nbytes
    with pytest.raises(CacheError, match="outside"), torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    assert figures == (cache.nbytes, cache.live_nbytes)


def test_an_implementation_changed_inside_the_block(family, prompt) -> None:
    model = family("llama", layers=1)
    ids, _ = prompt()
    with compress(model, H2O()) as cache, torch.no_grad():
        model.config._attn_implementation = "sdpa"
        model(ids, past_key_values=cache)  # a prompt of its own, right by accident
        with pytest.raises(CacheError, match="did not go through the cache"):
            model(ids[:, :1], past_key_values=cache)


def test_policies_that_look_at_tokens_need_them(family, prompt) -> None:
    model = family("llama")
    ids, _ = prompt()
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        with compress(model, FastGen()) as cache, pytest.raises(CacheError, match="give input_ids"):
            model(inputs_embeds=embedded, past_key_values=cache)
        with compress(model, SnapKV(0.5, 8)) as cache:
            model(inputs_embeds=embedded, past_key_values=cache)
        assert cache.kept()[0] == [[20, 20]]


def test_streaming_llm_needs_rotary_embeddings(family) -> None:
    with pytest.raises(CacheError, match="no rotary embedding"), compress(family("opt"), StreamingLLM()):
        pass


def test_a_sequence_of_padding_alone(family, prompt) -> None:
    model = family("llama")
    ids, mask = prompt(2)
    mask[1] = 0
    with compress(model, H2O()) as cache, torch.no_grad(), pytest.raises(CacheError, match="sequence 1"):
        model(ids, attention_mask=mask, past_key_values=cache)


def test_soft_capped_attention() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8,
        )
    ).eval()  # fmt: skip
    with pytest.raises(CacheError, match="caps its attention softly"), compress(model, Full()):
        pass


def test_bad_slack(family) -> None:
    with pytest.raises(CacheError, match="slack"), compress(family("llama"), Full(), slack=-1):
        pass
