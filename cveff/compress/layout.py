"""Where a group's units lie along a dimension, and which indices of it stay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def stays(layout: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Which indices of a dimension are left.

    Args:
        layout: (size, 2) int64, the (group index, unit) of every index; group -1: of none.
        masks: one bool array a group: which of its units stay.

    Returns:
        (size,) bool.
    """
    result = np.ones(len(layout), bool)
    for index in np.unique(layout[:, 0]):
        if index >= 0:
            mine = layout[:, 0] == index
            result[mine] = masks[index][layout[mine, 1]]
    return result
