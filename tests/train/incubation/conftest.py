"""A small set of digits, and small networks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import cveff
from cveff.data import Data
from cveff.data import load as load_data
from cveff.model import Model
from cveff.runtime.input_spec import InputSpec

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 6, "drop_path_rate": 0.2},
    ),
    "resnet": ("resnet18", {"channels": [64, 8, 8, 8]}),
    "convnext": (
        "convnext_atto",
        {"depths": [1, 1, 3, 1], "dims": [8, 8, 8, 8], "drop_path_rate": 0.2},
    ),
}


@pytest.fixture(scope="session")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(128)), val=data.val.subset(np.arange(60)))


@pytest.fixture(scope="session")
def network(digits: Data) -> Callable[[str], Model]:
    """Build a small network by its family's name."""

    def build(name: str, **arguments: Any) -> Model:
        torch.manual_seed(0)
        architecture, own = NETWORKS[name]
        size = {"vit": (8, 8), "resnet": (16, 16), "convnext": (32, 32)}[name]
        spec = InputSpec(size=size, channels=1, mean=(0.3,), std=(0.35,), enlarge=True)
        return cveff.create(
            architecture, labels=digits.labels, input=spec, timm_arguments={**own, **arguments}
        )

    return build
