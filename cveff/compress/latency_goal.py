"""From a latency to masks: predict, build, measure the exported file on the device, correct, until it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from cveff.compress.analysis import light_copy
from cveff.compress.groups import Analysis
from cveff.compress.latency_model import LatencyModel
from cveff.compress.sensitivity import Cost
from cveff.compress.sizes import Sizes
from cveff.compress.trace import Trace, trace
from cveff.errors import StepError
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
BUSY = 0.3
"""Cores that others keep busy past which a warning is due: an engine's threads wait for the slowest of them."""


class LatencyGoal:
    """The search for one goal.

    Args:
        model: what is pruned.
        reference: what a relative goal is a share of, timed beside every candidate.
        analysis, sizes: of `model`.
        timer: exports and times.
    """

    def __init__(
        self,
        model: Model,
        reference: Model,
        analysis: Analysis,
        sizes: Sizes,
        timer: ModelTimer,
        progress: Progress,
    ) -> None:
        self._model, self._reference, self._analysis, self._sizes = model, reference, analysis, sizes
        self._timer, self._progress = timer, progress
        self._milliseconds = float("nan")
        self._predictor = self.make_predictor(timer)

    @staticmethod
    def make_predictor(timer: ModelTimer) -> LatencyModel:
        """What predicts candidates before they are measured: the blocks' table of the timer's engine and threads."""
        return LatencyModel.load(BlockLatency(timer.engine, timer.threads))

    def reach(self, counts_for: Callable[[Cost, float], dict[str, int]], share: float) -> dict[str, int]:
        """Counts whose exported file takes at most `share` of the reference's time, and little less.

        Args:
            counts_for: cost and the most it may be -> units every group keeps.

        Raises:
            StepError: the smallest network the settings allow is slower; the message says how fast it is.
        """
        others = busy_cores()
        if others is not None and others > BUSY:
            self._progress.message(
                f"warning: other programs keep {others:.1f} of {usable_cores()} cores busy; latencies measured now "
                "may mislead"
            )
        whole = self.predict(trace(self._reference.module, self._reference.spec.input))
        wanted, low, high = share * whole, 0.0, whole  # predicted milliseconds, and what brackets them
        best: tuple[float, dict[str, int]] | None = None
        tried: dict[tuple[int, ...], float] = {}
        for attempt in range(ATTEMPTS):
            counts = counts_for(self._cost, wanted)
            key = tuple(counts.values())
            if key in tried:
                break
            measured = tried[key] = self._measure(counts)
            self._progress.message(
                f"attempt {attempt + 1}: {100 * measured:.1f}% of the latency measured, {100 * share:.1f}% wanted"
            )
            if measured <= share * (1 + OVER):
                if best is None or measured > best[0]:
                    best = (measured, counts)
                if measured >= share * (1 - CLOSE):
                    break
                low = max(low, wanted)
            else:
                if self._cost(counts) > wanted * 1.001:
                    break  # nothing more can go
                high = min(high, wanted)
            wanted = self._next(wanted * share * (1 - CLOSE / 3) / measured, low, high)
        if best is None:
            counts = counts_for(self._cost, 0.0)  # as small as it gets
            least = min([self._measure(counts), *tried.values()])
            if least > share * (1 + OVER):
                raise StepError(
                    f"{share:.3g} of the model's latency cannot be reached by taking channels out: the least is "
                    f"{least:.3g} ({least * self._milliseconds:.3g} ms); lower min_fraction, allow depth=True, or "
                    "ask for less"
                )
            best = (least, counts)
        return best[1]

    def _next(self, wanted: float, low: float, high: float) -> float:
        """The proposed prediction, kept inside what has been bracketed."""
        margin = 0.05 * (high - low)
        return float(np.clip(wanted, low + margin, high - margin))

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
