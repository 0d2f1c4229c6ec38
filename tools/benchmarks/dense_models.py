"""Three networks for Fashion-MNIST at 64×64, trained here, that compression starts from: mobile CNN, ResNet, ViT."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import cveff
from cveff.data import Data
from cveff.data.augment import Augmentation
from cveff.model import Model
from cveff.pipeline import create_for
from cveff.progress import Progress
from cveff.recipe import ModelSettings
from cveff.train import Train

IMAGE_SIZE = 64
AUGMENTATION = Augmentation(flip="random", crop_padding=4)


@dataclass(frozen=True)
class Dense:
    """An architecture, how it is trained, and how its compressed versions recover."""

    architecture: str
    train: Train
    recover: Train
    arguments: dict[str, Any] = field(default_factory=dict)


def adamw(epochs: int, learning_rate: float, precision: str) -> Train:
    """The training that all of them get."""
    return Train(
        epochs=epochs,
        batch_size=128,
        optimizer="adamw",
        learning_rate=learning_rate,
        weight_decay=0.05,
        warmup_epochs=min(1.0, epochs / 4),
        precision=precision,  # type: ignore[arg-type]
        augmentation=AUGMENTATION,
        checkpoint_minutes=2,
    )


def _dense(architecture: str, train: Train, arguments: dict[str, Any] | None = None) -> Dense:
    """What is compressed is trained as the dense network was, once more: the rate is rewound (Renda et al., "Comparing
    Rewinding and Fine-tuning in Neural Network Pruning", ICLR 2020, section 3).
    """
    return Dense(architecture, train, train, arguments or {})


MODELS = {
    # Depthwise convolutions train faster in float32 than in bfloat16 on processors that have both.
    "mobile": _dense("mobilenetv4_conv_small", adamw(8, 2e-3, "fp32")),
    "resnet": _dense("resnet18", adamw(6, 2e-3, "auto"), {"channels": [32, 64, 128, 256]}),
    "vit": _dense(
        "vit_tiny_patch16_224",
        adamw(12, 1e-3, "fp32"),
        {"patch_size": 16, "depth": 6, "embed_dim": 128, "num_heads": 4},
    ),
}


def dense(
    name: str,
    seed: int,
    data: Data,
    folder: Path,
    progress: Progress,
    epochs: int | None = None,
    settings: Dense | None = None,
) -> Model:
    """The trained network, from `folder` if it is there; training that was stopped goes on where it was.

    Args:
        epochs: fewer, for a quick look.
        settings: of a network that is not in `MODELS`.
    """
    saved = folder / f"{name}-{seed}"
    if (saved / "model.json").is_file():
        return cveff.load(saved)
    settings = settings or MODELS[name]
    train = settings.train if epochs is None else adamw(epochs, 1e-3, settings.train.precision)
    torch.manual_seed(seed)
    model = create_for(
        ModelSettings(
            architecture=settings.architecture,
            image_size=IMAGE_SIZE,
            arguments=settings.arguments,
            enlarge=True,
        ),
        data,
        seed=seed,
    )
    model = cveff.apply(
        model,
        train,
        data=data,
        seed=seed,
        progress=progress,
        folder=folder / f"{name}-{seed}-training",
        resume=True,
    )
    cveff.save(model, saved)
    return model
