"""From a latency to masks: predict, build, measure the exported file on the device, correct, until it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from cveff.compress.analysis import light_copy
from cveff.compress.blocks import macs
from cveff.compress.groups import Analysis
from cveff.compress.latency_model import LatencyModel
from cveff.compress.sensitivity import Cost
from cveff.compress.sizes import Sizes
from cveff.compress.trace import Trace, trace
from cveff.compress.unreachable import UnreachableError
from cveff.measure.block_latency import BlockLatency
from cveff.measure.threads import busy_cores, usable_cores
from cveff.model import Model, with_module
from cveff.progress import Progress
from cveff.steps import ModelTimer

CLOSE = 0.03
"""Relative distance below the goal at which the search ends."""
OVER = 0.01
"""How far above the goal a measured latency may be: what two measurements of one file differ by."""
ATTEMPTS = 8
ARITHMETIC = 0.2
"""Weight of the share of operations that is left, beside predicted time, where that alone finds nothing more to cut."""
BUSY = 0.3
"""Cores that others keep busy past which a warning is due: an engine's threads wait for the slowest of them."""


class LatencyGoal:
    """The search for one goal.

    Args:
        model: what is pruned.
        reference: what a relative goal is a share of, timed beside every candidate.
        analysis, sizes: of `model`.
        timer: exports and times.
        predictor: of candidates, before they are measured.
    """

    def __init__(
        self,
        model: Model,
        reference: Model,
        analysis: Analysis,
        sizes: Sizes,
        timer: ModelTimer,
        predictor: LatencyModel,
        progress: Progress,
    ) -> None:
        self._model, self._reference, self._analysis, self._sizes = model, reference, analysis, sizes
        self._timer, self._predictor, self._progress = timer, predictor, progress
        self._milliseconds = float("nan")

    @staticmethod
    def make_predictor(timer: ModelTimer, reference: Model) -> LatencyModel:
        """What predicts candidates before they are measured: the table of blocks of the timer's engine and threads,
        matched to the reference's measured time.
        """
        model = LatencyModel.load(BlockLatency(timer.engine, timer.threads))
        measured = timer.milliseconds({"reference": reference})["reference"]
        return model.matched(trace(reference.module, reference.spec.input), measured)

    def reach(self, counts_for: Callable[[Cost, float], dict[str, int]], share: float) -> dict[str, int]:
        """Counts whose exported file takes at most `share` of the reference's time, and little less.

        Args:
            counts_for: cost and the most it may be -> units every group keeps.

        Raises:
            UnreachableError: the smallest network these groups allow is slower; the message says how fast it is.
        """
        others = busy_cores()
        if others is not None and others > BUSY:
            self._progress.message(
                f"warning: other programs keep {others:.1f} of {usable_cores()} cores busy; latencies measured now "
                "may mislead"
            )
        whole = self.predict(trace(self._reference.module, self._reference.spec.input))
        tried: dict[tuple[int, ...], float] = {}
        best = self._search(counts_for, self._cost, whole, share, tried)
        if best is None:
            # Where the table sees nothing left to save, arithmetic still may, which the measurement then tells.
            operations = max(macs(self._analysis.trace), 1)

            def blended(counts: Mapping[str, int]) -> float:
                left = macs(self._analysis.trace, self._sizes.shapes(counts)) / operations
                return self._cost(counts) + ARITHMETIC * whole * left

            best = self._search(counts_for, blended, (1 + ARITHMETIC) * whole, share, tried)
            if best is None:
                counts = counts_for(blended, 0.0)  # as small as it gets
                measured = self._measure(counts)
                least = min(measured, *tried.values())
                if measured > share * (1 + OVER):
                    raise UnreachableError(
                        f"{share:.3g} of the model's latency cannot be reached: the least is {least:.3g} "
                        f"({least * self._milliseconds:.3g} ms)"
                    )
                best = counts
        return best

    def _search(
        self,
        counts_for: Callable[[Cost, float], dict[str, int]],
        cost: Cost,
        whole: float,
        share: float,
        tried: dict[tuple[int, ...], float],
    ) -> dict[str, int] | None:
        """The largest network tried that keeps to `share`; None: by `cost` nothing that small could be made.

        Args:
            whole: what `cost` gives for the reference.
            tried: counts -> what they measured; added to.
        """
        wanted: float | None = share * whole
        low, high = (0.0, 0.0), (whole, 1.0)  # in `cost`'s unit, and measured
        best: tuple[float, dict[str, int]] | None = None
        for attempt in range(ATTEMPTS):
            if wanted is None:
                break
            counts = counts_for(cost, wanted)
            key = tuple(counts.values())
            if key not in tried:
                tried[key] = self._measure(counts)
                self._progress.message(
                    f"attempt {attempt + 1}: {100 * tried[key]:.1f}% of the latency measured, "
                    f"{100 * share:.1f}% wanted"
                )
            measured, reached = tried[key], cost(counts)
            if measured <= share * (1 + OVER):
                if best is None or measured > best[0]:
                    best = (measured, counts)
                if measured >= share * (1 - CLOSE):
                    break
                low = max(low, (max(wanted, reached), measured))
            else:
                if reached > wanted * 1.001:
                    break  # nothing more can go
                high = min(high, (wanted, measured))
            wanted = _between(low, high, share * (1 - CLOSE / 3))
        return None if best is None else best[1]

    def predict(self, network: Trace) -> float:
        """Milliseconds of a traced network, by the blocks' table."""
        return self._predictor.predict(network)

    def _cost(self, counts: Mapping[str, int]) -> float:
        return self._predictor.predict(self._analysis.trace, self._sizes.shapes(counts))

    def _measure(self, counts: Mapping[str, int]) -> float:
        """Time of the network with these counts, relative to the reference timed beside it."""
        keep = {group.name: np.arange(group.size) < counts[group.name] for group in self._analysis.groups}
        edit = self._analysis.edit(keep, self._model.module)
        small = with_module(self._model, edit.apply(light_copy(self._model.module)).eval(), edit)
        times = self._timer.milliseconds({"reference": self._reference, "pruned": small})
        self._milliseconds = times["reference"]
        return times["pruned"] / times["reference"]


def _between(low: tuple[float, float], high: tuple[float, float], goal: float) -> float | None:
    """Where a line through both ends, (cost, measured), meets `goal`, kept off the ends; None: there is no room."""
    room = high[0] - low[0]
    if room <= 1e-3 * high[0]:
        return None
    rise = high[1] - low[1]
    share = (goal - low[1]) / rise if rise > 0 else 0.5
    return low[0] + room * float(np.clip(share, 0.05, 0.95))
