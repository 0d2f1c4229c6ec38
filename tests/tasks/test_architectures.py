"""Task models by name: torchvision's networks, saved and loaded like any other model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import get_model, get_model_weights

import cveff
from cveff.errors import CheckpointError, CveffError, UnknownModelError
from cveff.tasks import architectures
from cveff.tasks.architectures import ARCHITECTURES

SSDLITE, LRASPP = "ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (SSDLITE, {"num_classes": 4, "width_mult": 0.25}),
        ("retinanet_resnet50_fpn_v2", {"num_classes": 3, "image_size": (64, 96), "score_thresh": 0.1}),
        (LRASPP, {"labels": ["nothing", "road"], "image_size": 64}),
        ("deeplabv3_mobilenet_v3_large", {"num_classes": 3, "image_size": 64, "aux_loss": True}),
    ],
)
def test_save_then_load_is_bit_equal(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cveff.create(name, **arguments)
    assert model.spec.task == ARCHITECTURES[name].task
    cveff.save(model, tmp_path / "model")
    again = cveff.load(tmp_path / "model")
    assert again.spec == model.spec
    images = torch.randn(1, 3, *model.spec.input.size)
    with torch.inference_mode():
        one, two = model.module(images), again.module(images)
    for ours, theirs in zip(
        *(values if isinstance(values, tuple) else (values,) for values in (one, two)), strict=True
    ):
        assert torch.equal(ours, theirs)
    if model.spec.task == "detection":
        assert again.module.suppression == model.module.suppression


def test_labels_are_those_of_the_published_weights() -> None:
    model = cveff.create(LRASPP)
    assert model.spec.labels[0] == "__background__" and len(model.spec.labels) == 21


def test_torchvisions_weights_load_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = get_model(LRASPP, weights=None, weights_backbone=None, num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = cveff.create(LRASPP, 3, image_size=64, weights=tmp_path / "weights.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model.module(images), network(images)["out"])


def test_published_retinanet_is_frozen_with_epsilon_0() -> None:
    """Its state dict has no batch counts, and torchvision sets epsilon after loading it."""
    module = architectures.build("retinanet_resnet50_fpn", {"num_classes": 2}, (64, 64))
    assert not any("num_batches_tracked" in key for key in module.state_dict())
    assert {layer.eps for layer in module.modules() if "Frozen" in type(layer).__name__} == {0.0}


def test_pretrained_asks_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    network = get_model("deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, aux_loss=True)
    published = type(get_model_weights("deeplabv3_mobilenet_v3_large").DEFAULT)
    monkeypatch.setattr(published, "get_state_dict", lambda *_, **__: network.state_dict())
    model = cveff.create("deeplabv3_mobilenet_v3_large", image_size=64, pretrained=True)
    assert model.spec.arguments == {"aux_loss": True, "num_classes": 21}
    key = "classifier.4.weight"
    assert torch.equal(model.module.state_dict()[key], network.state_dict()[key])


def test_no_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(type(get_model_weights(LRASPP).DEFAULT), "get_state_dict", offline)
    with pytest.raises(CheckpointError, match=r"no route.*weights="):
        cveff.create(LRASPP, pretrained=True)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        (SSDLITE, {"image_size": 300}, r"takes images of \(320, 320\), not \(300, 300\)"),
        ("retinanet_resnet50_fpn_v2", {"image_size": 100}, "multiples of 32"),
        (LRASPP, {"channels": 1}, "takes 3 channels"),
        (LRASPP, {"num_classes": 1}, "the background is one"),
        (LRASPP, {"num_classes": 300}, "a mask holds 255 at most"),
        (LRASPP, {"num_classes": 3, "labels": ["a", "b"]}, "2 labels were given for 3 classes"),
        (LRASPP, {"aux_loss": True}, r"does not take the arguments \['aux_loss'\]"),
        (SSDLITE, {"num_classes": 3, "drop_rate": 0.1}, r"it takes num_classes, score_thresh"),
        (SSDLITE, {"num_classes": 3, "score_thresh": 2}, "score_threshold is 2"),
    ],
)
def test_bad_arguments_are_refused(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(CveffError, match=words):
        cveff.create(name, **arguments)


def test_an_unknown_detector_is_refused_with_what_comes_close() -> None:
    with pytest.raises(UnknownModelError, match="retinanet_resnet50_fpn_v2"):
        cveff.create("retinanet_resnet101_fpn_v2")


def test_weights_of_another_number_of_classes_are_refused(tmp_path: Path) -> None:
    cveff.save(cveff.create(LRASPP, 3, image_size=64), tmp_path / "model")
    with pytest.raises(CheckpointError, match="of another shape"):
        cveff.create(LRASPP, 4, image_size=64, weights=tmp_path / "model" / "weights.safetensors")
