"""Small networks of every family, with their sub-nets."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import cveff
from cveff.compress.proof import awakened
from cveff.dynamic import Elastic
from cveff.dynamic.supernet import Supernet
from cveff.model import Model
from cveff.steps import Run

NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"layers": [1, 3, 1, 1], "channels": [16, 16, 32, 32]}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "mobilenetv4": ("mobilenetv4_conv_small_035", {}),
    "efficientnet": ("tf_efficientnet_lite0", {}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 3, 1], "dims": [16, 16, 32, 32]}),
    "vit": ("vit_tiny_patch16_224", {"depth": 3, "embed_dim": 48, "num_heads": 3, "patch_size": 8}),
}


@lru_cache(None)
def _net(family: str) -> tuple[Model, Supernet]:
    """A network of 48×48 images in evaluation mode, all of whose weights matter, and its sub-nets. Only read it."""
    architecture, arguments = NETS[family]
    torch.manual_seed(0)
    model = cveff.create(architecture, num_classes=5, image_size=48, timm_arguments=arguments)
    settings = Elastic(
        widths=(0.75, 0.5), resolutions=(32,), kernel_transform=family == "convnext", round_to=4
    )
    supernet = settings.prepare(model, Run())
    module = supernet.space.apply(awakened(model.module, seed=0)).eval()
    if family == "convnext":
        with torch.no_grad():
            for name, matrix in module.named_parameters():
                if name.startswith("elastic_kernels."):
                    matrix.normal_(0, 0.05)
    return Model(model.spec, module), supernet


def _images(size: tuple[int, int], count: int = 3, seed: int = 0) -> Tensor:
    """(count, 3, H, W) noise."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net() -> Callable[[str], tuple[Model, Supernet]]:
    """Family -> a network and its sub-nets, made once."""
    return _net


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """(height, width), count, seed -> images."""
    return _images
