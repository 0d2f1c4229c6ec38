"""Random streams that are keyed, not consumed in turn."""

from __future__ import annotations

import numpy as np

from cveff.errors import DataError


def generator(*key: int) -> np.random.Generator:
    """A random stream that depends on `key` alone: batches can be made in any order, by any process.

    Raises:
        DataError: a part of the key (a seed, an epoch) is negative.
    """
    if min(key) < 0:
        raise DataError(f"seed and epoch must be 0 or more, not {min(key)}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
