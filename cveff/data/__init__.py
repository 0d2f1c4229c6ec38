"""Images and their labels: named sets, folders, shards; batches for training, scoring and calibration.

Every public name loads on first use, so importing this room costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cveff.data.augmentation import Augmentation
    from cveff.data.dataset import Data, Split
    from cveff.data.folder import load_images
    from cveff.data.loading import load
    from cveff.data.memory import MemorySplit
    from cveff.data.report import DataReport
    from cveff.data.sampling import calibration_images, channel_statistics

_HOME = {
    "Augmentation": "cveff.data.augmentation",
    "Data": "cveff.data.dataset",
    "DataReport": "cveff.data.report",
    "MemorySplit": "cveff.data.memory",
    "Split": "cveff.data.dataset",
    "calibration_images": "cveff.data.sampling",
    "channel_statistics": "cveff.data.sampling",
    "load": "cveff.data.loading",
    "load_images": "cveff.data.folder",
}

__all__ = [
    "Augmentation",
    "Data",
    "DataReport",
    "MemorySplit",
    "Split",
    "calibration_images",
    "channel_statistics",
    "load",
    "load_images",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cveff.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
