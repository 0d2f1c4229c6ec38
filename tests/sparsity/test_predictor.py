"""Predictors learn what depends on the token: better than hot neurons on documents they never saw."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cveff.errors import StepError
from cveff.sparsity import CATS, TEAL, HotNeurons, Oracle, Predictor, RandomNeurons, fit, quality
from cveff.sparsity.collect import split_documents, watch
from cveff.sparsity.structure import find_mlps

TRAINED = Predictor(0.25, rank=16, epochs=60, batch_size=256, learning_rate=0.01, patience=60, held_out=0.2)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_recall_on_documents_never_seen(decoder, documents, name: str) -> None:
    network = decoder(name)
    texts = documents(60)
    train, held = texts[:50], texts[50:]
    found = {
        method.kind: quality(network, fit(network, method, train), held)
        for method in (Oracle(0.25), HotNeurons(0.25), RandomNeurons(0.25), TRAINED)
    }
    recall = {kind: sum(value.recall) / len(value.recall) for kind, value in found.items()}
    energy = {kind: sum(value.energy) / len(value.energy) for kind, value in found.items()}
    assert recall["oracle"] == 1 and energy["oracle"] > energy["predictor"]
    # 18 of 72 neurons and 400 values: three standard deviations of chance are 0.07.
    assert recall["random"] == pytest.approx(0.25, abs=0.07)
    assert recall["predictor"] > recall["hot"] + 0.05 > recall["random"] + 0.05
    assert energy["predictor"] > energy["hot"]
    assert found["predictor"].tokens == 200 and found["predictor"].chosen == pytest.approx((0.25, 0.25))


def test_a_predictor_that_ignores_its_input_does_not_beat_hot_neurons(decoder, documents) -> None:
    network, texts = decoder("llama"), documents(40)
    fitted = fit(network, TRAINED, texts[:30])
    blind = replace(
        fitted, tensors=tuple(part | {"second": torch.zeros_like(part["second"])} for part in fitted.tensors)
    )
    scores = [
        sum(quality(network, choice, texts[30:]).recall)
        for choice in (fitted, blind, fit(network, HotNeurons(0.25), texts[:30]))
    ]
    assert scores[1] < scores[0]
    assert scores[1] <= scores[2] + 0.04  # 200 tokens: the same choice but for ties in how hot neurons are


def test_the_report_is_of_documents_held_out(decoder, documents) -> None:
    """Even the first one (DejaVu's own code reads a training row in its place)."""
    train, held = split_documents(20, 0.1, seed=5)
    assert len(held) == 2 and sorted(train + held) == list(range(20))
    network, texts = decoder("llama"), documents(8)
    method = replace(
        TRAINED,
        epochs=2,
        held_out=0.1,
        seed=next(s for s in range(99) if split_documents(8, 0.1, s)[1] == [0]),
    )
    fitted = fit(network, method, texts)
    own = quality(network, fitted, texts[:1])
    assert fitted.report["recall"] == pytest.approx(sum(own.recall) / 2, abs=1e-6)
    still = replace(method, learning_rate=1e-12)
    other = [torch.full_like(texts[0], 7), *texts[1:]]  # what is held out sets nothing
    one, two = (fit(network, still, read).tensors for read in (texts, other))
    assert all(torch.equal(a["bias"], b["bias"]) for a, b in zip(one, two, strict=True))


def test_padding_is_not_learned_from(decoder, text) -> None:
    network = decoder("llama")
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    counted: list[int] = []
    layer = find_mlps(network)[0].first[0]
    document = {"input_ids": text(1, 5), "attention_mask": mask}
    watch(network, [document, text(2, 4)], {"a": layer}, lambda name, place, x: counted.append(len(x)))
    assert counted == [3, 8] and not layer._forward_pre_hooks


def test_thresholds_keep_their_share_on_other_documents(decoder, documents) -> None:
    network, texts = decoder("gemma3"), documents(60)
    for keep in (0.25, 0.5):
        found = quality(network, fit(network, CATS(keep), texts[:40]), texts[40:])
        assert found.chosen == pytest.approx((keep, keep), abs=0.05)
    with pytest.raises(StepError, match="teal chooses no neurons"):
        quality(network, fit(network, TEAL(), texts), texts)


def test_fitting_is_repeatable(decoder, documents) -> None:
    network, method = decoder("llama"), replace(TRAINED, epochs=2)
    one, two = (fit(network, method, documents(8)) for _ in range(2))
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(one.tensors, two.tensors, strict=True) for name in a
    )
