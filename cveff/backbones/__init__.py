"""Backbones by name (timm's, and the few it lacks) and the structural edits that belong to them.

Importing this package registers cveff's own architectures with timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cveff.backbones import small_resnet as _small_resnet  # registers its architectures

if TYPE_CHECKING:
    from cveff.backbones.fold import FoldBatchNorm, FoldedBatchNorm
    from cveff.backbones.reparameterize import Reparameterize, has_branches

# These import `cveff.model`, which imports this package: they load on first use.
_HOME = {
    "FoldBatchNorm": "cveff.backbones.fold",
    "FoldedBatchNorm": "cveff.backbones.fold",
    "Reparameterize": "cveff.backbones.reparameterize",
    "has_branches": "cveff.backbones.reparameterize",
}

OWN_ARCHITECTURES: tuple[str, ...] = _small_resnet.ARCHITECTURES
"""Names that cveff adds to timm's registry."""

__all__ = ["OWN_ARCHITECTURES", "FoldBatchNorm", "FoldedBatchNorm", "Reparameterize", "has_branches"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cveff.backbones' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
