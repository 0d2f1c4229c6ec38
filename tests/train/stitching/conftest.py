"""Three small networks of different families, trained on digits for seconds."""

from __future__ import annotations

import copy
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
from cveff.train import Train

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("small_resnet_s", {"widths": [8, 12, 16], "depths": [1, 1, 1]}),
    "resnet": ("resnet18", {"channels": [16, 16, 24, 24], "drop_rate": 0.1}),
    "vit": ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 24, "num_heads": 2, "depth": 4}),
}
INPUT = InputSpec(size=(16, 16), channels=1, mean=(0.3,), std=(0.35,), crop=1.0, enlarge=True)
TRAIN = Train(
    epochs=6, batch_size=32, optimizer="adamw", learning_rate=3e-3, precision="fp32", warmup_epochs=0.0
)


@pytest.fixture(scope="session")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(600)))


def create(name: str, data: Data, seed: int = 0, **arguments: Any) -> Model:
    torch.manual_seed(seed)
    architecture, own = NETWORKS[name]
    model = cveff.create(architecture, labels=data.labels, input=INPUT, timm_arguments={**own, **arguments})
    model.module.eval()
    return model


@pytest.fixture(scope="session")
def trained(digits: Data) -> Callable[[str], Model]:
    """A copy of a trained network, by its family's name."""
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = cveff.apply(create(name, digits), TRAIN, data=digits, device="cpu")
        return Model(made[name].spec, copy.deepcopy(made[name].module))

    return get


@pytest.fixture
def fresh(digits: Data) -> Callable[..., Model]:
    """An untrained network, by its family's name."""
    return lambda name, **arguments: create(name, digits, **arguments)
