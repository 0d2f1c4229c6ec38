"""From milliseconds to a sub-net: predict, search, measure the best on the device, correct the prediction, again."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Protocol

from cveff.compress.latency_goal import OVER, LatencyGoal
from cveff.compress.unreachable import UnreachableError
from cveff.dynamic.elastic_space import Levels, SubNet
from cveff.dynamic.search import Search
from cveff.dynamic.subnet_cost import SubNetCosts
from cveff.dynamic.supernet import Supernet
from cveff.model import Model
from cveff.steps import Run

if TYPE_CHECKING:
    from cveff.dynamic.extract import ExtractSubNet

ATTEMPTS = 4
FINALISTS = 5
"""Sub-nets of a search whose files are measured."""
CLOSE = 0.03
"""Relative error of the prediction below which it is not corrected any more."""


class Scores(Protocol):
    """What tells how good sub-nets are, and makes them plain models."""

    def accuracy(self, subnet: SubNet) -> float:
        """Share of held-out images that it is right on."""
        ...

    def calibrated(self, subnet: SubNet) -> Model:
        """The sub-net as it would be shipped."""
        ...


def choose(
    settings: ExtractSubNet, supernet: Supernet, scores: Scores, run: Run
) -> tuple[SubNet, dict[str, float]]:
    """The most accurate sub-net whose exported file keeps to `settings.latency_ms`, and its figures.

    Raises:
        UnreachableError: the smallest sub-net is slower.
    """
    limit, timer, space = settings.latency_ms, run.timer, supernet.space
    assert limit is not None and timer is not None
    ends = {"largest": space.largest, "smallest": space.smallest}
    models = {name: scores.calibrated(subnet) for name, subnet in ends.items()}
    measured = timer.milliseconds(models)
    if measured["largest"] <= limit:
        run.progress.message(f"the whole network takes {measured['largest']:.3g} ms: nothing has to go")
        return space.largest, {"extract/latency_ms": measured["largest"]}
    if measured["smallest"] > limit * (1 + OVER):
        raise UnreachableError(
            f"{limit:g} ms cannot be reached: the fastest sub-net takes {measured['smallest']:.3g} ms, the largest "
            f"{measured['largest']:.3g} ms; ask for more, or train smaller widths, depths or resolutions"
        )
    costs = SubNetCosts(supernet)
    predictor = LatencyGoal.make_predictor(timer, models["largest"])
    known: dict[SubNet, float] = {space.smallest: measured["smallest"]}
    allowed = limit
    for attempt in range(1, ATTEMPTS + 1):
        least = costs.milliseconds(space.smallest, predictor)
        allowed = max(allowed, least)

        def fits(levels: Levels, allowed: float = allowed) -> bool:
            return costs.milliseconds(space.subnet(levels), predictor) <= allowed

        search = Search(
            space.alternatives,
            lambda levels: scores.accuracy(space.subnet(levels)),
            fits,
            space.subnet,
            run.seed,
        )
        if settings.search == "evolution":
            search.evolve(settings.evolution)
        else:
            search.at_random(settings.evolution.evaluations)
        finalists = [space.subnet(levels) for levels in search.best(FINALISTS)]
        times = timer.milliseconds(
            {str(index): scores.calibrated(subnet) for index, subnet in enumerate(finalists)}
        )
        known |= {subnet: times[str(index)] for index, subnet in enumerate(finalists)}
        off = statistics.median(known[subnet] / costs.milliseconds(subnet, predictor) for subnet in finalists)
        run.progress.message(
            f"attempt {attempt}: {len(search.scores)} sub-nets scored, the best {len(finalists)} take "
            f"{min(times.values()):.3g} to {max(times.values()):.3g} ms, {limit:g} wanted"
        )
        if abs(off * allowed / limit - 1) <= CLOSE or allowed == least > limit / off:
            break
        allowed = limit / off
    found = max((subnet for subnet, time in known.items() if time <= limit * (1 + OVER)), key=scores.accuracy)
    return found, {
        "extract/latency_ms": known[found],
        "extract/predicted_ms": costs.milliseconds(found, predictor),
        "extract/evaluations": float(len(search.scores)),
    }
