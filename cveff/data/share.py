"""`Share`: the part of each training batch that one of several processes prepares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cveff.errors import DataError


@dataclass(frozen=True)
class Share:
    """One rank's part of every batch; the parts of all ranks are the batch, each image once.

    Attributes:
        rank: whose part, from 0.
        world: how many ranks there are.

    Raises:
        DataError: at construction, for a rank that is none.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise DataError(f"rank {self.rank} of {self.world} is none; ranks go from 0 to world - 1")

    def positions(self, count: int, mixes: bool = False) -> np.ndarray:
        """Places in a batch of `count` images that are this rank's, ascending int64.

        Args:
            mixes: each image is mixed with the one as far from the batch's end as it is from the start (mixup,
                cutmix); then both go to the same rank. Parts differ by an image at most, or by two.
        """
        places = np.arange(count)
        keys = np.minimum(places, count - 1 - places) if mixes else places
        return places[keys % self.world == self.rank]

    def smallest(self, count: int, mixes: bool = False) -> int:
        """Images in the smallest part of a batch of `count`."""
        return len(Share(self.world - 1, self.world).positions(count, mixes))
