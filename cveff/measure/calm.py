"""`Calm`: whether the machine is as fast as it has been, told by timing one and the same thing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

CALM = 1.15
"""Times its least that the probe may take on a calm machine."""
EVERY = 1.0
"""Seconds between two looks at the probe."""


class Calm:
    """Looks at a probe now and then.

    Attributes:
        least: the probe's least milliseconds so far.
        now: whether the last look found the machine as fast as it has been.
    """

    def __init__(self, probe: Callable[[], float], least: float = math.inf) -> None:
        """
        Args:
            probe: times something of a fixed size; milliseconds.
            least: what it took earlier, on the same machine.
        """
        self._probe, self.least = probe, least
        self.now = True
        self._looked = -math.inf

    @property
    def is_due(self) -> bool:
        """Whether the last look is older than `EVERY` seconds."""
        return time.monotonic() - self._looked > EVERY

    def look(self) -> bool:
        """Time the probe, if that is due; whether the machine is calm."""
        if self.is_due:
            milliseconds = self._probe()
            self.now = milliseconds <= CALM * self.least
            self.least = min(milliseconds, self.least)
            self._looked = time.monotonic()
        return self.now
