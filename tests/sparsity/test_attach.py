"""An attached network: dense at 100%, the masked dense network below, and itself again afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cveff.errors import StepError
from cveff.sparsity import CATS, TEAL, HotNeurons, Oracle, Predictor, RandomNeurons, attach, find_mlps, fit

WHOLE = (Oracle(1.0), HotNeurons(1.0), RandomNeurons(1.0), Predictor(1.0, epochs=1), CATS(1.0), TEAL(1.0))
HALF = tuple(replace(method, keep=0.5) for method in WHOLE)
kind = lambda method: method.kind  # noqa: E731


@torch.no_grad()
def decode(network: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token, computed alone after the others, (B, vocabulary)."""
    past = network(ids[:, :-1], use_cache=True).past_key_values
    return network(ids[:, -1:], past_key_values=past).logits[:, 0]


@pytest.mark.parametrize("method", WHOLE, ids=kind)
def test_everything_kept_is_the_dense_network(decoder, text, documents, family: str, method) -> None:
    network, ids = decoder(family), text(2)
    expected = decode(network, ids)
    for tokens in ("decode", "all"):
        with attach(network, fit(network, method, documents()), tokens=tokens, dense_above=1.0) as sparse:
            # Logits are of the order of 10 and summed in another order: float32 differs in the last digits.
            torch.testing.assert_close(decode(network, ids), expected, rtol=0, atol=1e-5)
        usage = sparse.usage()
        assert usage and all(use.dense == 0 and use.chosen == 1 for use in usage.values())


@pytest.mark.parametrize("method", HALF, ids=kind)
def test_one_text_decodes_as_the_masked_dense_network_would(
    decoder, text, documents, family: str, method
) -> None:
    network, ids = decoder(family), text(1)
    dense = decode(network, ids)
    fitted = fit(network, method, documents())
    with torch.no_grad():
        past = network(ids[:, :-1], use_cache=True).past_key_values  # prompts are dense in both
    with attach(network, fitted, tokens="all"), torch.no_grad():
        masked = network(ids[:, -1:], past_key_values=past).logits[:, 0]
    with attach(network, fitted, dense_above=1.0) as sparse:
        found = decode(network, ids)
    torch.testing.assert_close(found, masked, rtol=0, atol=1e-5)
    assert (found - dense).abs().max() > 1e-4  # something was left out
    for use in sparse.usage().values():
        assert (
            use.calls == 1 and use.dense == 0 and use.chosen == pytest.approx(use.union) and use.union < 0.9
        )


@pytest.mark.parametrize("method", [Oracle(0.25), CATS(0.25), TEAL(0.25)], ids=kind)
def test_texts_together_compute_what_any_of_them_chose(decoder, text, documents, method) -> None:
    network, ids = decoder("llama"), text(5)
    fitted = fit(network, method, documents())
    with attach(network, fitted, dense_above=1.0) as sparse:
        decode(network, ids)
    for use in sparse.usage().values():
        assert use.chosen <= use.union <= 1 and use.union > 1.2 * use.chosen


def test_too_large_a_union_is_computed_whole(decoder, text, documents) -> None:
    network, ids = decoder("qwen2"), text(3)
    expected = decode(network, ids)
    fitted = fit(network, HotNeurons(0.5), documents())
    with attach(network, fitted, dense_above=0.49) as sparse:
        found = decode(network, ids)
    # The last layer's weight lies transposed meanwhile, so that sums may be taken in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert all(use.dense == use.calls == 1 for use in sparse.usage().values())


def test_the_share_from_which_dense_is_faster_is_measured_once_a_size(
    decoder, text, documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(whole, part, size, device) -> float:
        asked.append(size)
        torch.testing.assert_close(part(torch.arange(size)), whole(), rtol=1e-4, atol=1e-4)
        return 0.3

    monkeypatch.setattr("cveff.sparsity.layers.crossover", measured)
    for name, count in (("llama", 1), ("opt", 1)):
        network = decoder(name)
        with attach(network, fit(network, HotNeurons(0.5), documents())) as sparse:
            for _ in range(2):
                decode(network, text(1))
        assert len(asked) == count and all(use.dense == 2 for use in sparse.usage().values())
        asked.clear()


def test_prompts_are_dense_and_generation_is_sparse(decoder, text, documents, family: str) -> None:
    network, ids = decoder(family), text(2)
    with attach(network, fit(network, HotNeurons(0.5), documents()), dense_above=1.0) as sparse:
        with torch.no_grad():
            logits = network(ids).logits
        assert sparse.usage() == {}
        network.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        torch.testing.assert_close(logits, network(ids).logits, rtol=0, atol=1e-5)
    assert all(use.calls == 3 for use in sparse.usage().values())  # the prompt gives the first token


@pytest.mark.parametrize("method", [Oracle(0.5), TEAL(0.5)], ids=kind)
def test_the_network_is_itself_again(decoder, text, documents, family: str, method) -> None:
    network, ids = decoder(family), text(2)
    before = {name: (value.clone(), value.stride()) for name, value in network.state_dict().items()}
    logits = decode(network, ids)
    with pytest.raises(KeyboardInterrupt):
        with attach(network, fit(network, method, documents())):
            raise KeyboardInterrupt
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name][0]) and value.stride() == before[name][1]
    assert not any("forward" in module.__dict__ for module in network.modules())
    assert torch.equal(decode(network, ids), logits)


def test_bfloat16(decoder, text, documents) -> None:
    network, ids = decoder("llama", torch.bfloat16), text(1)
    with attach(network, fit(network, Predictor(1.0, epochs=1), documents()), dense_above=1.0):
        found = decode(network, ids)
    expected = decode(decoder("llama"), ids)
    assert found.dtype == torch.bfloat16
    # bfloat16 has 8 bits and the network two layers.
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_lookahead_sees_the_mlp_before(decoder, text, documents) -> None:
    network, ids = decoder("llama"), text(1)
    fitted = fit(network, Predictor(0.5, lookahead=True, epochs=1), documents())
    inputs, seen = [], []
    with attach(network, fitted, dense_above=1.0) as sparse:
        for hook in sparse.hooks.values():
            choose = hook.method.choose
            monkey = lambda tensors, mlp, x, s, choose=choose: (  # noqa: E731
                inputs.append(x),
                seen.append(s),
                choose(tensors, mlp, x, s),
            )[2]
            hook.method = type("Spy", (), {"choose": staticmethod(monkey), "lookahead": True})()
        decode(network, ids)
    assert torch.equal(seen[0], inputs[0]) and torch.equal(seen[1], inputs[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"tokens": "prompt"}, "give 'decode' or 'all'"), ({"dense_above": 1.5}, "give a share from 0 to 1")],
)
def test_wrong_options(decoder, documents, options: dict, words: str) -> None:
    network = decoder("llama")
    with pytest.raises(StepError, match=words):
        with attach(network, fit(network, RandomNeurons()), **options):
            pass


def test_one_method_at_a_time(decoder) -> None:
    network = decoder("llama")
    fitted = fit(network, RandomNeurons())
    with attach(network, fitted):
        with pytest.raises(StepError, match=r"model\.layers\.0\.mlp is sparse already"):
            with attach(network, fitted):
                pass
    assert len(find_mlps(network)) == 2
