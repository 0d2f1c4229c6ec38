"""Decoded boxes, scores and detections are torchvision's, on the same pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cveff.measure.detections import agreement
from cveff.model import Model
from cveff.runtime.detections import Detections, suppress, unpad
from cveff.tasks.suppress import Suppressed


def torchvisions(network: nn.Module, images: np.ndarray) -> list[Detections]:
    """What torchvision's own forward detects in images that it need not resize."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        found = network(list(pixels))
    return [{key: value.numpy() for key, value in image.items()} for image in found]


def normalized(model: Model, images: np.ndarray) -> torch.Tensor:
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (model.spec.input.mean, model.spec.input.std)
    )
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


@pytest.mark.parametrize(
    ("kind", "size"),
    [("ssd", (96, 96)), ("retinanet", (96, 96)), ("retinanet", (64, 160)), ("ssd", (64, 128))],
)
def test_detections_are_torchvisions(kind: str, size: tuple[int, int], detector: Any, batch: Any) -> None:
    model, network = detector(kind, size)
    images = batch(model)
    expected = torchvisions(network, images)
    assert min(len(image["scores"]) for image in expected) >= 5
    assert len({int(label) for image in expected for label in image["labels"]}) >= 2
    with torch.inference_mode():
        boxes, scores = model.module(normalized(model, images))
        padded = Suppressed(model.module, model.module.suppression)(normalized(model, images))[:3]
    outside = [
        suppress(b, s, model.module.suppression) for b, s in zip(boxes.numpy(), scores.numpy(), strict=True)
    ]
    inside = [unpad(*(value.numpy() for value in row)) for row in zip(*padded, strict=True)]
    for found in (outside, inside):
        result = agreement(found, expected)
        assert result.share == 1
        assert result.min_iou > 0.999 and result.max_score_difference < 1e-5


def test_suppression_removes_something_and_the_limit_cuts(detector: Any, batch: Any) -> None:
    """Or the agreement above would be of less than it says."""
    model, network = detector("retinanet")
    expected = torchvisions(network, batch(model))
    assert max(len(image["scores"]) for image in expected) == network.detections_per_img
    assert min(len(image["scores"]) for image in expected) < network.detections_per_img
    network.nms_thresh = 1.0
    network.detections_per_img = 10_000
    everything = torchvisions(network, batch(model))
    assert (
        sum(len(image["scores"]) for image in everything)
        > sum(len(image["scores"]) for image in expected) + 50
    )


def test_state_dict_is_torchvisions(detector: Any) -> None:
    for kind in ("ssd", "retinanet"):
        model, network = detector(kind)
        assert model.module.state_dict().keys() == network.state_dict().keys()


def test_boxes_lie_inside_the_image(detector: Any) -> None:
    model, _ = detector("ssd", (64, 128))
    with torch.inference_mode():
        boxes = model.module.decode(torch.full((1, len(model.module.anchors), 4), 40.0))
    assert boxes.min() >= 0
    assert boxes[..., 0::2].max() <= 128 and boxes[..., 1::2].max() <= 64
