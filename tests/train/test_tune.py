"""Tuning a part of a network leaves the rest to the bit; adapters load bit-equal and merge into the weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cveff
from cveff.data import Data
from cveff.data import load as load_data
from cveff.errors import CheckpointError, MissingDependencyError, StepError
from cveff.model import Model
from cveff.recipe import parse_recipe
from cveff.train import Adapters, MergeAdapters, Train, Tune

TRAIN = Train(
    epochs=1,
    batch_size=32,
    optimizer="adamw",
    learning_rate=0.01,
    precision="fp32",
    warmup_epochs=0,
    keep="last",
)
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"patch_size": 2, "depth": 2, "embed_dim": 16, "num_heads": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16), "patch_size": 1},
    "resnet18": {"channels": (8, 8, 8, 8)},
}


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    return replace(data, train=data.train.subset(np.arange(160)), val=data.val.subset(np.arange(40)))


def create(name: str) -> Model:
    torch.manual_seed(0)
    arguments = NETWORKS[name]
    return cveff.create(name, num_classes=10, image_size=8, channels=1, timm_arguments=arguments)


def changed(before: Model, after: Model) -> set[str]:
    old, new = before.module.state_dict(), after.module.state_dict()
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize(
    "name, method, touched",
    [
        ("vit_tiny_patch16_224", "head", lambda n: n.startswith("head.")),
        ("vit_tiny_patch16_224", "bias", lambda n: n.endswith("bias") or n.startswith("head.")),
        ("vit_tiny_patch16_224", "norm", lambda n: "norm" in n or n.startswith("head.")),
        ("vit_tiny_patch16_224", "blocks", lambda n: n.startswith(("blocks.1.", "norm.", "head."))),
        (
            "convnext_atto",
            "norm",
            lambda n: "norm" in n or "downsample.0" in n or n.startswith(("stem.1", "head.fc")),
        ),
        ("convnext_atto", "blocks", lambda n: n.startswith(("stages.3.blocks.0.", "head."))),
        ("resnet18", "head", lambda n: n.startswith("fc.")),
        ("resnet18", "blocks", lambda n: n.startswith(("layer4.1.", "fc."))),
    ],
)
def test_what_is_not_tuned_stays_to_the_bit(digits: Data, name: str, method: Any, touched: Any) -> None:
    model = create(name)
    tuned = cveff.apply(model, Tune(method, train=TRAIN), data=digits, device="cpu")
    found = changed(model, tuned)
    assert found and all(touched(path) for path in found), sorted(path for path in found if not touched(path))
    parameters = {path for path, item in tuned.module.named_parameters() if touched(path)}
    # A bias that a norm takes away again, or of attention's keys, has no gradient to follow.
    assert len(parameters - found) <= 0.3 * len(parameters)
    assert all(parameter.requires_grad for parameter in tuned.module.parameters())


@pytest.mark.parametrize(
    "name, method",
    [
        ("vit_tiny_patch16_224", "lora"),
        ("vit_tiny_patch16_224", "loha"),
        ("resnet18", "lora"),
        ("vit_tiny_patch16_224", "dora"),
        ("convnext_atto", "lora"),
    ],
)
def test_adapters_load_bit_equal_and_merge(digits: Data, tmp_path: Path, name: str, method: Any) -> None:
    pytest.importorskip("peft")
    model = create(name)
    settings = Tune(method, rank=2, merge=False, train=TRAIN)
    tuned = cveff.apply(model, settings, data=digits, device="cpu", folder=tmp_path / "run")
    (edit,) = tuned.spec.edits
    assert isinstance(edit, Adapters) and edit.rank == 2
    cveff.save(tuned, tmp_path / "tuned")
    loaded = cveff.load(tmp_path / "tuned")
    # Training leaves kernels in channels_last memory, which rounds otherwise.
    tuned.module.to(memory_format=torch.contiguous_format)
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tuned.module(images)
        assert torch.equal(loaded.module(images), expected)
        merged = cveff.apply(loaded, MergeAdapters())
        assert merged.spec.edits == ()
        # Sums in another order.
        torch.testing.assert_close(merged.module(images), expected, rtol=1e-4, atol=1e-5)
    adapted = {f"{path}.weight" for path in edit.layers}
    assert all(path in adapted or path.startswith(("head.", "fc.")) for path in changed(model, merged))
    with pytest.raises(StepError, match="no adapters to merge"):
        cveff.apply(merged, MergeAdapters())


def test_a_tuned_model_is_merged_by_default_and_exports(digits: Data, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = create("vit_tiny_patch16_224")
    step = Tune(layers=("blocks.*.attn.qkv",), train=TRAIN)
    tuned = cveff.apply(model, step, data=digits, device="cpu", folder=tmp_path, resume=True)
    assert tuned.spec == model.spec
    assert changed(model, tuned) == {f"blocks.{i}.attn.qkv.weight" for i in range(2)} | {
        "head.weight",
        "head.bias",
    }
    again = cveff.apply(model, step, data=digits, device="cpu", folder=tmp_path, resume=True)
    assert not changed(tuned, again)
    cveff.save(tuned, tmp_path / "model")
    assert not changed(tuned, cveff.load(tmp_path / "model"))


def test_settings_that_cannot_be_are_refused(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    for change, words in (
        ({"method": "prefix"}, "tune.method is 'prefix'"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"method": "head", "layers": ("x",)}, "leave them out"),
    ):
        with pytest.raises(StepError, match=words):
            Tune(**change)
    model = create("vit_tiny_patch16_224")
    with pytest.raises(StepError, match=r"num_blocks is 5 and VisionTransformer has 2 blocks"):
        cveff.apply(model, Tune("blocks", num_blocks=5, train=TRAIN), data=digits, device="cpu")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cveff\[peft\]'"):
        cveff.apply(model, Tune(train=TRAIN), data=digits, device="cpu")


def test_layers_that_are_not_there_are_refused(digits: Data) -> None:
    pytest.importorskip("peft")
    model = create("vit_tiny_patch16_224")
    with pytest.raises(StepError, match=r"'blocks\.9' is no hidden layer; there are blocks\.0\.attn\.qkv"):
        cveff.apply(model, Tune(layers=("blocks.9",), train=TRAIN), data=digits, device="cpu")
    with pytest.raises(CheckpointError, match=r"on blocks\.9 do not fit VisionTransformer"):
        Adapters("lora", 2, 4.0, ("blocks.9",)).apply(model.module)


def test_a_recipe_tunes_a_checkpoint() -> None:
    values = {
        "data": {"source": "digits"},
        "model": {"checkpoint": "digits"},
        "steps": [{"kind": "tune", "method": "norm", "train": {"epochs": 2}}, {"kind": "merge_adapters"}],
    }
    recipe = parse_recipe(values)
    assert recipe.steps[0].train.epochs == 2 and recipe.steps[0].train.optimizer == "adamw"
    assert parse_recipe(recipe.to_json()) == recipe
