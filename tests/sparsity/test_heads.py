"""Groups of heads: chosen together, keys and values always kept, and only the chosen ones answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cveff.errors import StepError
from cveff.sparsity import HeadPredictor, attach, fit, load

FAMILIES = ("llama", "qwen2", "gemma3", "phi", "opt")
SOME = HeadPredictor(0.5, epochs=3, batch_size=64)


@torch.no_grad()
def decode(network: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None):
    """Logits of the last token, computed alone after the others, and the cache."""
    before = None if mask is None else mask[:, :-1]
    past = network(ids[:, :-1], attention_mask=before, use_cache=True).past_key_values
    return network(ids[:, -1:], attention_mask=mask, past_key_values=past).logits[:, 0], past


@pytest.mark.parametrize("family", FAMILIES)
def test_all_groups_are_the_dense_network(decoder, text, documents, family: str) -> None:
    network, ids = decoder(family), text(2)
    expected, _ = decode(network, ids)
    fitted = fit(network, HeadPredictor(1.0, epochs=1), documents())
    for tokens in ("decode", "all"):
        with attach(network, fitted, tokens=tokens):
            torch.testing.assert_close(decode(network, ids)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_the_dense_network_with_the_other_groups_set_to_zero(
    decoder, text, documents, family: str, padded: bool
) -> None:
    network, ids = decoder(family), text(1)
    mask = torch.ones_like(ids)
    mask[:, :3] = not padded
    dense, kept = decode(network, ids, mask)
    fitted = fit(network, SOME, documents())
    with torch.no_grad():
        past = network(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
    with attach(network, fitted, tokens="all"), torch.no_grad():
        masked = network(ids[:, -1:], attention_mask=mask, past_key_values=past).logits[:, 0]
    with attach(network, fitted) as sparse:
        found, cache = decode(network, ids, mask)
    torch.testing.assert_close(found, masked, rtol=0, atol=1e-5)
    assert (found - dense).abs().max() > 1e-4
    assert all(use.chosen == 0.5 == use.union for use in sparse.usage().values())
    # Keys and values of the first layer depend on the token alone: those of skipped heads are there too.
    assert cache.layers[0].keys.shape == kept.layers[0].keys.shape
    torch.testing.assert_close(cache.layers[0].keys, kept.layers[0].keys)


def test_texts_together_and_afterwards_the_network_is_itself(
    decoder, text, documents, tmp_path: Path
) -> None:
    network, ids = decoder("llama"), text(6)
    dense, _ = decode(network, ids)
    fit(network, SOME, documents()).save(tmp_path)
    fitted = load(tmp_path)
    with attach(network, fitted) as sparse:
        found, _ = decode(network, ids)
    assert all(use.union >= use.chosen == 0.5 for use in sparse.usage().values())
    assert torch.isfinite(found).all()
    assert network.config._attn_implementation == "sdpa"
    assert torch.equal(decode(network, ids)[0], dense)


def test_what_cannot_choose_heads(decoder, documents) -> None:
    with pytest.raises(StepError, match="Phi3ForCausalLM has no attention with q_proj"):
        fit(decoder("phi3"), HeadPredictor(), documents())
    single = decoder("llama", num_key_value_heads=1)
    with pytest.raises(StepError, match="one head of keys and values"):
        fit(single, HeadPredictor(), documents())
    with pytest.raises(StepError, match=r"heads\.lookahead"):
        HeadPredictor(lookahead=True)
    with pytest.raises(StepError, match=r"heads\.keep"):
        HeadPredictor(keep=0)
    network = decoder("llama")
    fitted = fit(network, SOME, documents())
    network.set_attn_implementation("eager")
    with pytest.raises(StepError, match="attn_implementation='sdpa'"):
        with attach(network, fitted):
            pass
