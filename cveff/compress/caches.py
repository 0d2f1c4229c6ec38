"""What attention layers of LeViT's kind remember from a pass in evaluation mode: tensors of the old sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def caches(module: nn.Module) -> list[dict[Any, torch.Tensor]]:
    """Dictionaries of tensors that modules keep beside their parameters and buffers."""
    return [
        value
        for inner in module.modules()
        for name, value in vars(inner).items()
        if isinstance(value, dict)
        and name not in ("_parameters", "_buffers", "_modules")
        and value
        and all(isinstance(item, torch.Tensor) for item in value.values())
    ]
