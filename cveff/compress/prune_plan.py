"""How `Prune` gets from a goal to masks: score units, learn what groups cost, allocate, check on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cveff.compress.allocate import allocate
from cveff.compress.analysis import analyze, light_copy
from cveff.compress.batch_norm import recalibrate_batch_norm
from cveff.compress.blocks import macs
from cveff.compress.depth_plan import BlockChooser
from cveff.compress.drop_blocks import DropBlocks
from cveff.compress.groups import Analysis
from cveff.compress.importance import score
from cveff.compress.latency_goal import LatencyGoal
from cveff.compress.latency_model import LatencyModel
from cveff.compress.odd_images import odd_images, told, usual
from cveff.compress.samples import Batches, samples
from cveff.compress.scopes import keep_best, select
from cveff.compress.sensitivity import Cost, Curve, measured_curves, summed_curves
from cveff.compress.sizes import Sizes
from cveff.compress.trace import Trace, trace
from cveff.compress.unreachable import UnreachableError
from cveff.edits import Edit
from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.steps import Run

if TYPE_CHECKING:
    from cveff.compress.prune import Prune

_ADVICE = "lower min_fraction or round_to"
COMPARABLE = ("taylor", "hessian")
"""Criteria that estimate a change of the loss, and so compare across groups as they are."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be cut, and what it should bring.

    Attributes:
        analysis: of the network it was made for.
        keep: group name -> bool (size,): the units that stay.
        figures: shares of operations, parameters and units that are left.
        drop: residual blocks that go before; `analysis` is of the network without them.
    """

    analysis: Analysis
    keep: Mapping[str, np.ndarray]
    figures: Mapping[str, float]
    drop: DropBlocks | None = None

    def structure(self, model: Model) -> Model:
        """`model` cut by this plan: of the right shapes, and with weights that nothing has repaired yet."""
        edits: list[Edit] = []
        module = light_copy(model.module)
        if self.drop is not None:
            module = self.drop.apply(module)
            edits.append(self.drop)
        edit = self.analysis.edit(self.keep, module)
        return with_module(model, edit.apply(module).eval(), *edits, edit)

    @property
    def summary(self) -> str:
        """One line for people."""
        parts = [f"{100 * value:.0f}% of {name.rpartition('/')[2]}" for name, value in self.figures.items()]
        return f"pruning {len(self.keep)} groups to {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """Units before and after by group, what is frozen and why, and the figures; plain JSON values."""
        return {
            "figures": dict(self.figures),
            "blocks": [] if self.drop is None else list(self.drop.modules),
            "groups": {
                group.name: {"units": group.size, "left": int(self.keep[group.name].sum())}
                for group in self.analysis.groups
            },
            "frozen": {
                group.name: {"units": group.size, "reason": group.reason} for group in self.analysis.frozen
            },
        }


def make_plan(
    settings: Prune, model: Model, reference: Model, share: float, batches: Batches | None, run: Run
) -> Plan:
    """Plan one round.

    Args:
        model: what is pruned; left as it is.
        reference: what shares are of: the model before the first round.
        share: how much of the goal's quantity is to be left of the reference's; for `ratio`, of the units.
        batches: `calibration`'s.

    Raises:
        StepError: nothing can be pruned.
        UnreachableError: the goal cannot be reached, with `settings.depth` not even without all the blocks that can go.
    """
    planner = _Planner(settings, model, reference, share, batches, run)
    if not settings.depth:
        try:
            return planner.plan(None)
        except UnreachableError as error:
            raise UnreachableError(f"{error}; {_ADVICE}, allow depth=True, or ask for less") from None
    drop = planner.cheap_blocks()
    while True:
        try:
            return planner.plan(drop)
        except UnreachableError as error:
            more = planner.more_blocks(drop)
            if more is None:
                gone = 0 if drop is None else len(drop.modules)
                raise UnreachableError(
                    f"{error}, without {gone} residual blocks, all that can go; {_ADVICE}, or ask for less"
                ) from None
            run.progress.message(f"{error}; {len(more.modules)} blocks go")
            drop = more


@dataclass(frozen=True, eq=False)
class _Cut:
    """A network, some blocks gone, and what is known of its groups."""

    model: Model
    analysis: Analysis
    scores: dict[str, np.ndarray]
    curves: dict[str, Curve]
    sizes: Sizes


class _Planner:
    """What `make_plan` does, for one round."""

    def __init__(
        self,
        settings: Prune,
        model: Model,
        reference: Model,
        share: float,
        batches: Batches | None,
        run: Run,
    ) -> None:
        self._settings, self._model, self._reference = settings, model, reference
        self._share, self._batches, self._run = share, batches, run
        self._round_to = settings.round_to or run.channel_multiple
        self._predictor: LatencyModel | None = None
        if settings.goal in ("latency", "latency_ms"):
            assert run.timer is not None
            self._predictor = LatencyGoal.make_predictor(run.timer, reference)
        self._intact = self._cut(None)

    def plan(self, drop: DropBlocks | None) -> Plan:
        """A plan without these blocks.

        Raises:
            StepError: as `make_plan`; `UnreachableError` where fewer blocks would do.
        """
        cut = self._intact if drop is None else self._cut(drop)
        if self._settings.goal == "ratio":
            keep = _by_ratio(self._settings, cut, 1 - self._share, self._round_to)
        else:
            keep = {name: keep_best(cut.scores[name], count) for name, count in self._counts(cut).items()}
        return Plan(cut.analysis, keep, _figures(cut.analysis, cut.sizes, keep), drop)

    def cheap_blocks(self) -> DropBlocks | None:
        """The blocks without which the goal is reached at the least loss, blocks' and channels' added up; all that were
        tried, if the goal was not reached without any of them.
        """
        best, least = None, self._channel_loss(None)
        drop: DropBlocks | None = None
        for drop, loss in self._chooser.sequence():
            if loss >= least:
                break
            total = loss + self._channel_loss(drop)
            if total < least:
                best, least = drop, total
        if math.isinf(least):
            return drop
        if best is not None:
            names = ", ".join(best.modules)
            self._run.progress.message(f"{len(best.modules)} blocks cost less than channels: {names}")
        return best

    def _channel_loss(self, drop: DropBlocks | None) -> float:
        """What channels cost that reach the goal without these blocks, as predicted; infinite where none do."""
        curves, cut = self._intact.curves, self._intact
        if drop is not None:
            model = without_blocks(self._settings, self._model, drop, None)
            analysis = analyze(model.module, model.spec.input, self._settings.attention, self._run.seed)
            curves = {group.name: curves[group.name] for group in analysis.groups if group.name in curves}
            cut = _Cut(model, analysis, {}, curves, Sizes(analysis))
        cost, goal = self._cost(cut), self._share * self._whole
        counts = allocate(curves, lambda counts: cost({**cut.sizes.full, **counts}), goal)
        if cost({**cut.sizes.full, **counts}) > goal:
            return math.inf
        return sum(float(curve.losses[curve.counts.index(counts[name])]) for name, curve in curves.items())

    def more_blocks(self, drop: DropBlocks | None) -> DropBlocks | None:
        """`drop` and more, whatever they cost; None where no more can go."""
        return self._chooser.more(drop)

    def _cut(self, drop: DropBlocks | None) -> _Cut:
        settings, model = self._settings, self._model
        if drop is not None:
            model = without_blocks(settings, model, drop, self._batches)
        analysis = analyze(model.module, model.spec.input, settings.attention, self._run.seed)
        if not analysis.groups:
            reasons = sorted({group.reason for group in analysis.frozen})
            raise StepError(
                f"{model.spec.architecture} has no channels that could be pruned: "
                f"{'; '.join(reasons[:3]) or 'no layers'}"
            )
        scores = score(
            model.module, analysis.groups, settings.importance, batches=self._batches, seed=self._run.seed
        )
        curves = {} if settings.goal == "ratio" else self._curves(model, analysis, scores)
        return _Cut(model, analysis, scores, curves, Sizes(analysis))

    def _curves(self, model: Model, analysis: Analysis, scores: Mapping[str, np.ndarray]) -> dict[str, Curve]:
        """What each group costs; none where the scope does not ask."""
        settings = self._settings
        if settings.scope != "global":
            return {}
        if not settings.sensitivity:
            return summed_curves(
                analysis.groups,
                scores,
                is_comparable=settings.importance in COMPARABLE,
                round_to=self._round_to,
                min_fraction=settings.min_fraction,
            )
        assert self._batches is not None
        return measured_curves(
            model.module,
            analysis,
            scores,
            self._batches,
            round_to=self._round_to,
            min_fraction=settings.min_fraction,
            repair=settings.compensate,
            progress=self._run.progress,
        )

    def _counts(self, cut: _Cut) -> dict[str, int]:
        """Units that every group keeps, of a goal that is not a ratio."""
        settings, share = self._settings, self._share

        def counts_for(cost: Cost, goal: float) -> dict[str, int]:
            if settings.scope == "global":
                return allocate(cut.curves, cost, goal)
            return _uniformly(settings, cut, cost, goal, self._round_to)

        if self._predictor is not None:
            assert self._run.timer is not None
            goal = LatencyGoal(
                cut.model,
                self._reference,
                cut.analysis,
                cut.sizes,
                self._run.timer,
                self._predictor,
                self._run.progress,
            )
            return goal.reach(counts_for, share)
        cost, whole = self._cost(cut), self._whole
        counts = counts_for(cost, share * whole)
        if cost(counts) > 1.001 * share * whole:
            raise UnreachableError(
                f"prune.{settings.goal} {share:.3g} cannot be reached: with every group at its least "
                f"(min_fraction {settings.min_fraction:g}), {cost(counts) / whole:.3g} is left"
            )
        return counts

    def _cost(self, cut: _Cut) -> Cost:
        """What the goal counts, of a network with given counts; of a latency, as predicted."""
        predictor, found = self._predictor, cut.analysis.trace
        if predictor is not None:
            return lambda counts: predictor.predict(found, cut.sizes.shapes(counts))
        if self._settings.goal == "parameters":
            return lambda counts: float(cut.sizes.parameters(counts))
        return lambda counts: float(macs(found, cut.sizes.shapes(counts)))

    def _of_trace(self, found: Trace) -> float:
        """The same of a traced network."""
        if self._predictor is not None:
            return self._predictor.predict(found)
        return _parameters_of(found) if self._settings.goal == "parameters" else float(macs(found))

    @cached_property
    def _whole(self) -> float:
        """What the goal counts, of the reference."""
        if self._settings.goal == "parameters":
            return float(self._reference.num_parameters)
        return self._of_trace(trace(self._reference.module, self._reference.spec.input))

    @cached_property
    def _chooser(self) -> BlockChooser:
        assert self._batches is not None
        module, spec = self._model.module, self._model.spec.input
        return BlockChooser(
            module,
            spec,
            self._of_trace,
            self._batches,
            repair=self._settings.compensate,
            progress=self._run.progress,
        )


def calibration(settings: Prune, model: Model, run: Run) -> Batches | None:
    """The images that importance, sensitivity and repair look at; None where they are not needed.

    Those that the network computes far larger values on than on the others are left out (`odd_images`).
    """
    if not settings.needs_data:
        return None
    assert run.data is not None
    split = run.data.train if run.data.train is not None else run.data.val
    found = samples(split, model.spec.input, settings.images, seed=run.seed, device=str(run.device))
    odd = odd_images(model.module, found)
    if not bool(odd.any()):
        return found
    run.progress.message(f"{told(odd)}; nothing is chosen by them")
    return usual(found, odd)


def without_blocks(settings: Prune, model: Model, drop: DropBlocks, batches: Batches | None) -> Model:
    """A shallow copy of `model` without these blocks; its batch norms, where `settings` repair, as they are then."""
    small = drop.apply(light_copy(model.module)).eval()
    if settings.compensate and batches is not None:
        recalibrate_batch_norm(small, batches)
    return with_module(model, small, drop)


def _parameters_of(found: Trace) -> float:
    buffers = set(found.program.graph_signature.buffers)
    return float(
        sum(
            int(np.prod(found.shapes[name])) for name, path in found.parameters.items() if path not in buffers
        )
    )


def _uniformly(settings: Prune, cut: _Cut, cost: Cost, goal: float, round_to: int) -> dict[str, int]:
    """The smallest share that, taken everywhere alike, reaches the goal: bisected."""

    def counts(amount: float) -> dict[str, int]:
        return {name: int(mask.sum()) for name, mask in _by_ratio(settings, cut, amount, round_to).items()}

    low, high = 0.0, 0.999
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(counts(middle)) <= goal else (middle, high)
    return counts(high)


def _by_ratio(settings: Prune, cut: _Cut, amount: float, round_to: int) -> dict[str, np.ndarray]:
    return select(
        cut.analysis.groups,
        cut.scores,
        settings.scope,
        amount,
        module=cut.model.module,
        round_to=round_to,
        min_fraction=settings.min_fraction,
    )


def _figures(analysis: Analysis, sizes: Sizes, keep: Mapping[str, np.ndarray]) -> dict[str, float]:
    counts = {name: int(mask.sum()) for name, mask in keep.items()}
    full = sizes.full
    return {
        "prune/units": sum(counts.values()) / sum(full.values()),
        "prune/macs": macs(analysis.trace, sizes.shapes(counts)) / max(1, macs(analysis.trace)),
        "prune/parameters": sizes.parameters(counts) / max(1, sizes.parameters(full)),
    }
