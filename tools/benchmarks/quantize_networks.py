"""The networks that `quantize_peers.py` rounds, each with its images.

On Fashion-MNIST at 64×64, trained here: two of `dense_models.py`, a small RepVGG and a ConvNeXt. With ImageNet weights:
EfficientNet-Lite0, calibrated on crops of one half of the photographs of `photos.py`, judged on crops of the other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import dense_models
import numpy as np
import photos
from timm.models import register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

import cveff
import cveff.data
from cveff import model_zoo
from cveff.backbones.reparameterize import Reparameterize, has_branches
from cveff.data import Data, MemorySplit
from cveff.model import Model

LITE0 = "lite0"
REPVGG, VIT = "repvgg", "vit"
REPVGG_STAGES = ((2, 32), (3, 64), (4, 128), (1, 256))
"""Blocks and channels: A0's plan at half its depth and two thirds of its width."""


@register_model
def repvgg_small_64(pretrained: bool = False, **arguments: Any) -> ByobNet:
    """RepVGG (Ding et al., CVPR 2021) for images of 64×64: a stem and four stages, each of which halves them."""
    blocks = tuple(ByoBlockCfg(type="rep", d=depth, c=width, s=2) for depth, width in REPVGG_STAGES)
    accepted = {key: value for key, value in arguments.items() if key in ("num_classes", "in_chans")}
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=32), **accepted)


TRAINED = {
    "mobile": dense_models.MODELS["mobile"],
    REPVGG: dense_models.Dense(
        "repvgg_small_64", dense_models.adamw(8, 2e-3, "fp32"), dense_models.adamw(3, 2e-4, "fp32")
    ),
    VIT: dense_models.MODELS["vit"],
    "convnext": dense_models.Dense(
        "convnext_atto",
        dense_models.adamw(8, 2e-3, "auto"),
        dense_models.adamw(3, 2e-4, "auto"),
        {"depths": [2, 2, 4, 2], "dims": [32, 64, 128, 256]},
    ),
}
NETWORKS = (LITE0, *TRAINED)


@dataclass(frozen=True)
class Amount:
    """How much of everything.

    Attributes:
        calibration: images that every tool gets.
        crops: held-out crops a split of the photographs.
        train, test: images of Fashion-MNIST; None: all.
        epochs: of every training; None: its own.
    """

    calibration: int = 256
    crops: int = 350
    train: int | None = None
    test: int | None = None
    epochs: int | None = None


QUICK = Amount(calibration=16, crops=12, train=1024, test=500, epochs=1)


def fashion_mnist(amount: Amount) -> Data:
    """Its training images are trained on and calibrated on, its test images judged on."""
    data = cveff.data.load("fashion-mnist", seed=0)
    assert data.train is not None and data.test is not None
    return dataclasses.replace(
        data,
        train=data.train.subset(range(amount.train)) if amount.train else data.train,
        val=data.val.subset(range(amount.train)) if amount.train else data.val,
        test=data.test.subset(range(amount.test)) if amount.test else data.test,
    )


def subject(network: str, seed: int, folder: Path, amount: Amount, wheel: Path | None) -> tuple[Model, Data]:
    """A network, its branches merged, and its images.

    Args:
        seed: of the training, or of the split of the photographs.
        folder: where trained networks are, or come to be; a training that was stopped goes on.
        wheel: foolbox's, for its photographs.
    """
    if network == LITE0:
        model = model_zoo.load("efficientnet-lite0")
        return model, crops(model, seed, amount, wheel)
    data = fashion_mnist(amount)
    progress = common.Lines(f"{network}-{seed}")
    model = dense_models.dense(network, seed, data, folder, progress, amount.epochs, TRAINED[network])
    # Every tool gets one convolution a block: rounding the branches would be another network's rounding.
    return (cveff.apply(model, Reparameterize()) if has_branches(model.module) else model), data


def crops(model: Model, seed: int, amount: Amount, wheel: Path | None) -> Data:
    """Crops of one half of the photographs to calibrate on, of the other half to judge on."""
    spec = model.spec.input
    first, second = photos.split(photos.photographs(wheel), seed)
    return Data(
        "photographs",
        model.spec.labels,
        MemorySplit("calibration", np.stack(photos.crops(first, amount.calibration, spec, seed)), None),
        MemorySplit("held out", np.stack(photos.crops(second, amount.crops, spec, seed + 1000)), None),
    )
