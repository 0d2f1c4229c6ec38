"""What is fitted survives its file bit by bit, and fits no other network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cveff.errors import CheckpointError, StepError
from cveff.sparsity import CATS, TEAL, HotNeurons, Oracle, Predictor, RandomNeurons, attach, fit, load

METHODS = (
    Oracle(0.5),
    HotNeurons(0.3),
    RandomNeurons(0.5, seed=3),
    Predictor(0.5, rank=5, epochs=1),
    CATS(),
    TEAL(),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_saved_and_loaded_it_is_the_same(decoder, documents, tmp_path: Path, method) -> None:
    network = decoder("llama")
    fitted = fit(network, method, documents())
    fitted.save(tmp_path / "sparse")
    loaded = load(tmp_path / "sparse")
    assert (loaded.method, loaded.layers, loaded.report) == (fitted.method, fitted.layers, fitted.report)
    for own, other in zip(loaded.tensors, fitted.tensors, strict=True):
        assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    loaded.check(network)
    loaded.check(decoder("llama", torch.bfloat16))  # rounded weights are the same network


def test_it_fits_no_other_network(decoder, documents) -> None:
    network = decoder("llama")
    fitted = fit(network, HotNeurons(), documents())
    with pytest.raises(StepError, match=r"network has model\.decoder\.layers\.0 \(72, 32\)"):
        fitted.check(decoder("opt"))
    with torch.no_grad():
        network.model.layers[1].mlp.gate_proj.weight.mul_(1.1)
    with pytest.raises(StepError, match=r"other weights of model\.layers\.1\.mlp"):
        with attach(network, fitted):
            pass
    del network.model.layers[1]
    with pytest.raises(StepError, match="fitted to 2 layers, and the network has 1"):
        fitted.check(network)


def change(about: dict, key: str, value: object) -> None:
    about[key] = value


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda a, t: change(a, "version", 2), "version 2 is not 1"),
        (lambda a, t: change(a, "kind", "magic"), "is damaged"),
        (lambda a, t: change(a, "settings", {"keep": 7}), "give a share of the neurons"),
        (lambda a, t: change(a, "settings", {"hold": 1}), "is damaged"),
        (lambda a, t: a.pop("layers"), "is damaged"),
        (lambda a, t: t.update({"0.chosen": torch.full((72,), float("nan"))}), "not finite float32"),
        (lambda a, t: t.update({"9.chosen": torch.ones(72)}), "is damaged"),
    ],
)
def test_damaged_files(decoder, documents, tmp_path: Path, damage, words: str) -> None:
    fit(decoder("llama"), HotNeurons(), documents()).save(tmp_path)
    about = json.loads((tmp_path / "sparsity.json").read_text())
    tensors = load_file(tmp_path / "sparsity.safetensors")
    damage(about, tensors)
    (tmp_path / "sparsity.json").write_text(json.dumps(about))
    save_file(tensors, tmp_path / "sparsity.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path)


def test_tensors_of_another_shape_or_no_file(decoder, documents, tmp_path: Path) -> None:
    network = decoder("llama")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / "nothing")
    fit(network, HotNeurons(), documents()).save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "sparsity.safetensors")
    save_file({**tensors, "0.chosen": torch.ones(71)}, tmp_path / "a" / "sparsity.safetensors")
    with pytest.raises(StepError, match=r"has tensors {'chosen': \(71,\)}"):
        load(tmp_path / "a").check(network)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Predictor(keep=0.0), "predictor.keep is 0.0"),
        (lambda: CATS(keep=1.2), "cats.keep is 1.2"),
        (lambda: TEAL(keep=-1), "teal.keep"),
        (lambda: HotNeurons(keep=2), "hot.keep"),
        (lambda: RandomNeurons(keep=0), "random.keep"),
        (lambda: Oracle(keep=0), "oracle.keep"),
        (lambda: Predictor(rank=0), "predictor.rank is 0"),
        (lambda: Predictor(epochs=0), "predictor.epochs is 0"),
        (lambda: Predictor(learning_rate=0.0), "predictor.learning_rate"),
        (lambda: Predictor(held_out=1.0), "predictor.held_out"),
    ],
)
def test_wrong_settings(make, words: str) -> None:
    with pytest.raises(StepError, match=words):
        make()


def test_too_few_documents(decoder, documents) -> None:
    network = decoder("llama")
    for method in (HotNeurons(), CATS(), TEAL()):
        with pytest.raises(StepError, match="no documents"):
            fit(network, method, [])
    with pytest.raises(StepError, match="1 document cannot be split"):
        fit(network, Predictor(), documents(1))
