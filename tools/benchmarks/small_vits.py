"""The small vision transformers and their training that the incubation and growth benchmarks share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

import cveff
from cveff.console import working
from cveff.data import Data
from cveff.data import load as load_data
from cveff.data.augment import Augmentation
from cveff.log import FileLog
from cveff.model import Model
from cveff.pipeline import create_for, evaluate
from cveff.recipe import ModelSettings
from cveff.steps import Step
from cveff.train import Train

RUNS = common.ROOT / "runs" / "benchmarks"
WIDTH, HEADS, DEPTH, PATCH = 64, 4, 12, 7


def images(quick: bool, count: int | None = None, seed: int = 0) -> Data:
    """Fashion-MNIST, or 500 of its images for a quick look.

    Args:
        count: that many training images.
    """
    data = load_data("fashion-mnist", seed=seed)
    assert data.train is not None and data.test is not None
    if quick:
        few = np.arange(500)
        return replace(
            data, train=data.train.subset(few), val=data.val.subset(few), test=data.test.subset(few)
        )
    return data if count is None else replace(data, train=data.train.subset(np.arange(count)))


def vit(data: Data, seed: int, width: int = WIDTH, heads: int = HEADS, depth: int = DEPTH) -> Model:
    """A ViT with fresh weights: 16 patches of 7 × 7 pixels."""
    arguments: dict[str, Any] = {
        "patch_size": PATCH,
        "embed_dim": width,
        "num_heads": heads,
        "depth": depth,
        "mlp_ratio": 2.0,
    }
    return create_for(
        ModelSettings(architecture="vit_tiny_patch16_224", arguments=arguments), data, seed=seed
    )


def training(epochs: int, **settings: Any) -> Train:
    """AdamW with a cosine, as ViTs are trained."""
    return Train(
        **{
            "epochs": epochs,
            "batch_size": 128,
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 0.05,
            "warmup_epochs": min(1.0, epochs / 4),
            "clip_norm": 1.0,
            "precision": "fp32",
            "augmentation": Augmentation(flip="random", crop_padding=2),
            **settings,
        }
    )


def trained(model: Model, step: Step, data: Data, seed: int, folder: Path) -> Model:
    """`step` done on `model`; goes on where an earlier go was stopped."""
    with working() as progress, FileLog(folder) as log:
        return cveff.apply(
            model,
            step,
            data=data,
            device="cpu",
            seed=seed,
            folder=folder,
            resume=True,
            log=log,
            progress=progress,
        )


def accuracy(model: Model, data: Data) -> float:
    """Share of the evaluation split that `model` gets right."""
    with torch.no_grad():
        return evaluate(model, data)
