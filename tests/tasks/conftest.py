"""Detectors and a segmentation network of torchvision's classes, tiny, with answers that depend on the picture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.models.segmentation.lraspp import LRASPP

import cveff
from cveff.model import Model, ModelSpec
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.preprocess import preprocess
from cveff.tasks.detector import AnchorDetector
from cveff.tasks.segmenter import Segmenter

LABELS = ("background", "cat", "cup", "person", "tree")


class Pyramid(nn.Module):
    """Two feature maps, of 1/8 and 1/16 of the image."""

    def __init__(self, names: tuple[str, str] = ("0", "1")) -> None:
        super().__init__()
        self.out_channels: Any = 16
        self.names = names
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, 4, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.deeper = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        fine = self.stem(x)
        return OrderedDict(zip(self.names, (fine, self.deeper(fine)), strict=True))


def _ssd(size: tuple[int, int]) -> SSD:
    backbone = Pyramid()
    backbone.out_channels = [16, 16]
    boxes = DefaultBoxGenerator([[2], [2, 3]], min_ratio=0.15, max_ratio=0.6)
    network = SSD(backbone, boxes, size[::-1], len(LABELS), score_thresh=0.25, detections_per_img=40)
    for layer in network.head.classification_head.module_list:
        nn.init.normal_(layer.weight, std=0.4)
    for layer in network.head.regression_head.module_list:
        nn.init.normal_(layer.weight, std=0.4)
    return network


def _retinanet(size: tuple[int, int]) -> RetinaNet:
    network = RetinaNet(
        Pyramid(),
        len(LABELS),
        min_size=min(size),
        max_size=max(size),
        anchor_generator=AnchorGenerator(sizes=((16, 24), (32, 48)), aspect_ratios=((0.5, 1.0, 2.0),) * 2),
        score_thresh=0.42,
        topk_candidates=120,
        detections_per_img=50,
    )
    for name, module in network.head.named_modules():
        if isinstance(module, nn.Conv2d):
            last = name.endswith(("cls_logits", "bbox_reg"))
            nn.init.normal_(module.weight, std=0.4 if last else 0.12)
    nn.init.constant_(network.head.classification_head.cls_logits.bias, -1.0)
    return network


MAKERS: dict[str, Callable[[tuple[int, int]], nn.Module]] = {"ssd": _ssd, "retinanet": _retinanet}


@pytest.fixture(scope="session")
def detector() -> Callable[..., tuple[Model, nn.Module]]:
    """(model, torchvision's network with the same weights) of a kind and a size."""

    def make(kind: str, size: tuple[int, int] = (96, 96)) -> tuple[Model, nn.Module]:
        torch.manual_seed(3)
        network = MAKERS[kind](size).eval()
        spec = InputSpec(size, interpolation="bilinear", enlarge=True, crop_mode="squash")
        return Model(
            ModelSpec(f"tiny_{kind}", {}, spec, "detection", LABELS), AnchorDetector(network, size).eval()
        ), network

    return make


@pytest.fixture(scope="session")
def segmenter() -> tuple[Model, nn.Module]:
    """(model, torchvision's network with the same weights)."""
    torch.manual_seed(0)
    network = LRASPP(Pyramid(("low", "high")), 16, 16, len(LABELS), inter_channels=8).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
    spec = InputSpec((64, 80), interpolation="bilinear", enlarge=True, crop_mode="squash")
    return Model(
        ModelSpec("tiny_lraspp", {}, spec, "segmentation", LABELS), Segmenter(network).eval()
    ), network


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """Real pictures of different sizes, (H, W, 3) uint8."""
    data = pytest.importorskip("skimage.data")
    return [data.astronaut(), data.chelsea(), data.coffee(), data.astronaut()[100:300, 50:450]]


@pytest.fixture(scope="session")
def batch(photographs: list[np.ndarray]) -> Callable[[Model], np.ndarray]:
    """The photographs as a model takes them."""
    return lambda model: preprocess(photographs, model.spec.input)


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, detector: Any, segmenter: tuple[Model, nn.Module]
) -> Callable[..., Path]:
    """The file of a tiny model, exported once."""
    files: dict[tuple[str, str], Path] = {}

    def export(kind: str, option: str) -> Path:
        if (kind, option) not in files:
            model = segmenter[0] if kind == "lraspp" else detector(kind)[0]
            options = {"output": option} if kind == "lraspp" else {"nms": option}
            folder = tmp_path_factory.mktemp("tasks")
            files[kind, option] = cveff.export(model, folder / f"{kind}-{option}.onnx", **options)
        return files[kind, option]

    return export
