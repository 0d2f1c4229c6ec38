"""Architecture + edits + weights: the spec goes through JSON, save → load is bit-equal, bad files are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cveff
from cveff.errors import CheckpointError, CveffError, UnknownModelError
from cveff.model import Model, ModelSpec, build, load_spec

ARCHITECTURES = [
    "small_resnet_s",
    "test_resnet",
    "test_vit",
    "test_efficientnet",
    "test_convnext",
    "mobilenetv3_small_050",
]


def outputs(model: Model) -> torch.Tensor:
    spec = model.spec.input
    images = torch.randn(2, spec.channels, *spec.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.module.eval()(images)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_and_loaded_gives_bit_equal_outputs(architecture: str, tmp_path: Path) -> None:
    model = cveff.create(architecture, labels=("cat", "dög", "bird"), image_size=64)
    cveff.save(model, tmp_path / "m")
    loaded = cveff.load(tmp_path / "m")
    assert loaded.spec == model.spec
    assert torch.equal(outputs(loaded), outputs(model))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["model.json", "weights.safetensors"]


def test_a_description_is_read_without_the_weights(tmp_path: Path) -> None:
    model = cveff.create("test_resnet", num_classes=2)
    cveff.save(model, tmp_path / "m")
    (tmp_path / "m" / "weights.safetensors").unlink()
    assert load_spec(tmp_path / "m") == model.spec


def test_grey_input_and_a_size_of_its_own_travel_with_the_model(tmp_path: Path) -> None:
    model = cveff.create("test_vit", num_classes=4, image_size=(96, 64), channels=1)
    assert model.spec.input.size == (96, 64)
    assert model.spec.input.channels == len(model.spec.input.mean) == 1
    cveff.save(model, tmp_path / "m")
    assert cveff.load(tmp_path / "m").spec.input == model.spec.input
    assert outputs(model).shape == (2, 4)


def test_spec_survives_json() -> None:
    spec = cveff.create("test_resnet", num_classes=2).spec
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_saving_replaces_a_model_whole(tmp_path: Path) -> None:
    first = cveff.create("test_resnet", num_classes=2)
    second = cveff.create("test_resnet", num_classes=3)
    cveff.save(first, tmp_path / "m")
    cveff.save(second, tmp_path / "m")
    assert cveff.load(tmp_path / "m").spec == second.spec
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_weights_are_as_readable_as_the_rest(tmp_path: Path) -> None:
    cveff.save(cveff.create("test_resnet", num_classes=2), tmp_path / "m")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()}
    assert len(modes) == 1 and modes != {0o600}


def test_unknown_architecture_names_close_ones() -> None:
    with pytest.raises(UnknownModelError, match="mobilenetv4_conv_small"):
        cveff.create("mobilenet_v4_conv_small")
    with pytest.raises(UnknownModelError, match="cveff models"):
        cveff.create("zzzzqqqq")


def test_unknown_argument_is_named() -> None:
    with pytest.raises(CveffError, match="number_of_heads"):
        cveff.create("test_vit", number_of_heads=3)


def test_labels_and_classes_must_agree() -> None:
    with pytest.raises(CveffError, match="2 labels were given for 3 classes"):
        cveff.create("test_resnet", num_classes=3, labels=("a", "b"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_users_state_dict_is_loaded_strictly(suffix: str, tmp_path: Path) -> None:
    model = cveff.create("test_resnet", num_classes=2)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.module.state_dict().items()}}, path)
    else:
        save_file(model.module.state_dict(), path)
    other = cveff.create("test_resnet", num_classes=2, weights=path)
    assert torch.equal(outputs(other), outputs(model))


def test_weights_of_another_architecture_say_which_tensors_do_not_fit(tmp_path: Path) -> None:
    save_file(cveff.create("test_resnet", num_classes=2).module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit test_efficientnet.*missing.*unexpected"):
        cveff.create("test_efficientnet", num_classes=2, weights=tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"of another shape \(fc"):
        cveff.create("test_resnet", num_classes=5, weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_weights_are_refused(suffix: str, tmp_path: Path) -> None:
    state = cveff.create("test_resnet", num_classes=2).module.state_dict()
    path = tmp_path / f"w{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        cveff.create("test_resnet", num_classes=2, weights=path)


class Harmful:
    """What a hostile pickle would build."""

    def __reduce__(self) -> tuple:
        return (Path("harm-was-done").touch, ())


def test_code_in_a_pickle_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Harmful(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="state dict"):
        cveff.create("test_resnet", num_classes=2, weights=tmp_path / "w.pth")
    assert not (tmp_path / "harm-was-done").exists()


def test_missing_weights_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.pth does not exist"):
        cveff.create("test_resnet", weights=tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="not a saved model"):
        cveff.load(tmp_path)


def test_damaged_model_folders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    cveff.save(cveff.create("test_resnet", num_classes=2), path)
    good = (path / "model.json").read_text()

    (path / "model.json").write_text(good[:-20])
    with pytest.raises(CheckpointError, match="not valid JSON"):
        cveff.load(path)

    for change, words in (
        ({"checkpoint_version": 99}, "checkpoint version 99"),
        ({"edits": [{"kind": "from_the_future"}]}, "from_the_future"),
        ({"edits": [{"kind": "fold_batch_norm", "wrong": 1}]}, "do not fit"),
        ({"task": "telepathy"}, "telepathy"),
    ):
        (path / "model.json").write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(CheckpointError, match=words):
            cveff.load(path)

    values = json.loads(good)
    del values["labels"]
    (path / "model.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="labels"):
        cveff.load(path)


def test_a_tensor_too_few_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    cveff.save(cveff.create("test_resnet", num_classes=2), path)
    state = load_file(path / "weights.safetensors")
    state.pop(next(iter(state)))
    save_file(state, path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="1 missing"):
        cveff.load(path)


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cveff.create("test_resnet", num_classes=2)
    cveff.save(model, tmp_path / "m")

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(CveffError, match="No space left on device; nothing was left half-written"):
        cveff.save(cveff.create("test_resnet", num_classes=3), tmp_path / "m")
    assert cveff.load(tmp_path / "m").spec == model.spec
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_build_replays_edits_on_fresh_weights() -> None:
    from cveff.backbones import Reparameterize

    merged = cveff.apply(cveff.create("mobileone_s0", num_classes=2, image_size=32), Reparameterize())
    rebuilt = build(merged.spec)
    assert {k: v.shape for k, v in rebuilt.module.state_dict().items()} == {
        k: v.shape for k, v in merged.module.state_dict().items()
    }
    assert replace(rebuilt.spec) == merged.spec


def test_arguments_whose_names_mean_something_here_reach_timm() -> None:
    model = cveff.create("resnet18", 10, channels=1, timm_arguments={"channels": [8, 16, 16, 24]})
    assert model.spec.arguments["channels"] == [8, 16, 16, 24]
    assert model.module.conv1.in_channels == 1 and model.module.fc.in_features == 24
