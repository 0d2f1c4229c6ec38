"""`LatencyModel`: a network's time on a device from its blocks' times, without building or exporting it.

Predicted = scale · (sum of the blocks' kernels) + per_block · (number of blocks). The two numbers are fitted once a
device, on whole exported models: kernels run a little slower among others than alone, and an engine spends
microseconds between them. `anchored` fits the scale to one network, whose pruned versions are what a search compares.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cveff.compress.blocks import blocks
from cveff.compress.trace import Trace
from cveff.errors import CveffError
from cveff.files import write_json
from cveff.measure.block import Block
from cveff.measure.block_latency import BlockLatency

_log = logging.getLogger(__name__)

SCHEMA = 1
_STEPS = 30
_SMALL = 0.01
"""Relative errors below this count alike in the fit."""


@dataclass(frozen=True)
class LatencyModel:
    """Predicts milliseconds a call at batch 1 on the table's engine and threads.

    Attributes:
        table: the blocks' times.
        scale: milliseconds in a network for a millisecond alone.
        per_block: milliseconds between two blocks.
        num_models: whole models it was fitted on; 0: nothing was, `scale` is 1.
    """

    table: BlockLatency
    scale: float = 1.0
    per_block: float = 0.0
    num_models: int = 0

    def predict(self, trace: Trace, shapes: Mapping[str, tuple[int, ...]] | None = None) -> float:
        """Milliseconds of a traced network, or of its pruned version with these `shapes` (see `blocks`).

        Widths that were never measured are interpolated; those the table has are exact.
        """
        return self.predict_blocks(blocks(trace, shapes))

    def predict_blocks(self, network: Sequence[Block], *, interpolate: bool = True) -> float:
        """The same of a network's blocks; `interpolate=False` measures every width that is not in the table."""
        return self.scale * float(self.of_blocks(network, interpolate).sum()) + self.per_block * len(network)

    def of_blocks(self, network: Sequence[Block], interpolate: bool = True) -> np.ndarray:
        """(number of blocks,) milliseconds of each alone, not scaled."""
        return self.table.milliseconds(network, interpolate=interpolate)

    def anchored(
        self, trace: Trace, milliseconds: float, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> LatencyModel:
        """The same model, scaled so that it predicts exactly what was measured of this network.

        A search that builds what it found, times it and anchors to it is right the second time.

        Args:
            milliseconds: measured on the exported network.
            shapes: of its pruned version, if it was that.

        Raises:
            CveffError: `milliseconds` is not a positive number.
        """
        if not (math.isfinite(milliseconds) and milliseconds > 0):
            raise CveffError(f"milliseconds is {milliseconds!r}; give the positive time of a call")
        factor = milliseconds / self.predict(trace, shapes)
        return replace(self, scale=self.scale * factor, per_block=self.per_block * factor)

    def matched(self, trace: Trace, milliseconds: float) -> LatencyModel:
        """The same model with a time between blocks such that it predicts what was measured of this network.

        What an engine spends between kernels differs between networks (how they are cut into kernels, how its threads
        wait), and is most of a small one's time. Where the kernels alone are predicted slower than the network is,
        they are scaled instead.

        Args:
            milliseconds: measured on the exported network.

        Raises:
            CveffError: `milliseconds` is not a positive number.
        """
        network = blocks(trace)
        kernels = self.scale * float(self.of_blocks(network).sum())
        if not (math.isfinite(milliseconds) and milliseconds > kernels):
            return replace(self, per_block=0.0).anchored(trace, milliseconds)
        return replace(self, per_block=(milliseconds - kernels) / len(network))

    @classmethod
    def fit(
        cls, table: BlockLatency, networks: Sequence[Sequence[Block]], milliseconds: Sequence[float]
    ) -> LatencyModel:
        """The scale and the time between blocks with the least mean absolute relative error.

        Args:
            networks: blocks of whole models; those not in the table are measured.
            milliseconds: each model's time, measured on its exported file.

        Raises:
            CveffError: fewer than two models, or times that are not positive numbers.
        """
        times = np.asarray(milliseconds, dtype=float)
        if len(networks) != len(times) or len(times) < 2:
            raise CveffError(f"give two models or more and a time each, not {len(networks)} and {len(times)}")
        if not (np.isfinite(times).all() and (times > 0).all()):
            raise CveffError("a model's time is not a positive number of milliseconds; measure it again")
        sums = np.array([table.milliseconds(network).sum() for network in networks])
        counts = np.array([len(network) for network in networks], dtype=float)
        scale, per_block = least_absolute(np.stack([sums, counts], axis=1) / times[:, None])
        return cls(table, scale, per_block, len(times))

    def save(self) -> Path:
        """Keep the fit beside the table, where `load` finds it; returns the file."""
        path = _path(self.table)
        values = {"scale": self.scale, "per_block": self.per_block, "num_models": self.num_models}
        write_json(path, {"schema": SCHEMA, **values})
        return path

    @classmethod
    def load(cls, table: BlockLatency) -> LatencyModel:
        """The fit kept for this device; without one, the plain sum of the blocks, and a note of it in the log.

        Raises:
            CveffError: the file is damaged; the message names it.
        """
        path = _path(table)
        if not path.is_file():
            _log.info("no fit for this device in %s: predictions are plain sums of blocks", path)
            return cls(table)
        try:
            values = _checked(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CveffError(f"{path} is damaged ({error}); remove it and fit the model again") from error
        return cls(table, **values)


def _path(table: BlockLatency) -> Path:
    return table.path.with_suffix(".model.json")


def _checked(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    scale, per_block = float(values["scale"]), float(values["per_block"])
    if not (math.isfinite(scale) and scale > 0 and math.isfinite(per_block) and per_block >= 0):
        raise ValueError(f"scale {scale} and per_block {per_block} are no times")
    return {"scale": scale, "per_block": per_block, "num_models": int(values["num_models"])}


def least_absolute(features: np.ndarray) -> tuple[float, float]:
    """Weights w ≥ 0 with the least mean |features · w - 1|, by iteratively reweighted least squares: a model that the
    machine disturbed while it was timed hardly counts. features: (models, 2)."""
    weights, found = np.ones(len(features)), np.zeros(2)
    for _ in range(_STEPS):
        found = _non_negative(features * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(features @ found - 1), _SMALL))
    return float(found[0]), float(found[1])


def _non_negative(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares of two weights; where one comes out negative, without it."""
    found = np.linalg.lstsq(features, values, rcond=None)[0]
    for index in np.flatnonzero(found < 0):
        other = features[:, 1 - index]
        found = np.zeros(2)
        found[1 - index] = other @ values / (other @ other)
    return np.maximum(found, 0)
