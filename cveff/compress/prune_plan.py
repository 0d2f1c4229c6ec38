"""How `Prune` gets from a goal to masks: score units, learn what groups cost, allocate, check on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from cveff.compress.allocate import allocate
from cveff.compress.analysis import analyze, light_copy
from cveff.compress.blocks import macs
from cveff.compress.depth_plan import cheap_blocks
from cveff.compress.drop_blocks import DropBlocks
from cveff.compress.groups import Analysis
from cveff.compress.importance import score
from cveff.compress.latency_goal import LatencyGoal
from cveff.compress.latency_model import LatencyModel
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


def make_plan(settings: Prune, model: Model, reference: Model, share: float, run: Run) -> Plan:
    """Plan one round.

    Args:
        model: what is pruned; left as it is.
        reference: what shares are of: the model before the first round.
        share: how much of the goal's quantity is to be left of the reference's; for `ratio`, of the units.

    Raises:
        StepError: nothing can be pruned.
        UnreachableError: the goal cannot be reached, with `settings.depth` not even without all the blocks that can go.
    """
    batches = calibration(settings, model, run)
    predictor: LatencyModel | None = None
    if settings.goal in ("latency", "latency_ms"):
        assert run.timer is not None
        predictor = LatencyGoal.make_predictor(run.timer, reference)
    if not settings.depth:
        try:
            return _plan(settings, model, reference, share, batches, run, predictor, None)
        except UnreachableError as error:
            raise UnreachableError(f"{error}; {_ADVICE}, allow depth=True, or ask for less") from None
    blocks = _blocks(settings, model, reference, share, batches, run, predictor)
    drop = blocks(None)
    while True:
        try:
            return _plan(settings, model, reference, share, batches, run, predictor, drop)
        except UnreachableError as error:
            more = blocks(drop or DropBlocks(()))
            if more is None:
                raise UnreachableError(
                    f"{error}, without {len(drop.modules) if drop else 0} residual blocks, all that can go; {_ADVICE}, "
                    "or ask for less"
                ) from None
            run.progress.message(f"{error}; {len(more.modules)} blocks go")
            drop = more


def _plan(
    settings: Prune,
    model: Model,
    reference: Model,
    share: float,
    batches: Batches | None,
    run: Run,
    predictor: LatencyModel | None,
    drop: DropBlocks | None,
) -> Plan:
    """A plan without these blocks.

    Raises:
        StepError: as `make_plan`; `UnreachableError` where fewer blocks would do.
    """
    if drop is not None:
        model = with_module(model, drop.apply(light_copy(model.module)).eval(), drop)
    analysis = analyze(model.module, model.spec.input, settings.attention, run.seed)
    if not analysis.groups:
        reasons = sorted({group.reason for group in analysis.frozen})
        raise StepError(
            f"{model.spec.architecture} has no channels that could be pruned: {'; '.join(reasons[:3]) or 'no layers'}"
        )
    scores = score(model.module, analysis.groups, settings.importance, batches=batches, seed=run.seed)
    sizes = Sizes(analysis)
    if settings.goal == "ratio":
        keep = _by_ratio(settings, analysis, scores, 1 - share, model.module)
    else:
        counts_for = _allocator(
            settings, model, analysis, scores, _curves(settings, model, analysis, scores, batches, run)
        )
        if predictor is not None:
            assert run.timer is not None
            goal = LatencyGoal(model, reference, analysis, sizes, run.timer, predictor, run.progress)
            counts = goal.reach(counts_for, share)
        else:
            cost, whole = _counted(settings.goal, analysis, sizes), _whole(settings.goal, reference)
            counts = counts_for(cost, share * whole)
            if cost(counts) > 1.001 * share * whole:
                raise UnreachableError(
                    f"prune.{settings.goal} {share:.3g} cannot be reached: with every group at its least "
                    f"(min_fraction {settings.min_fraction:g}), {cost(counts) / whole:.3g} is left"
                )
        keep = {name: keep_best(scores[name], count) for name, count in counts.items()}
    return Plan(analysis, keep, _figures(analysis, sizes, keep), drop)


def calibration(settings: Prune, model: Model, run: Run) -> Batches | None:
    """The images that importance, sensitivity and repair look at; None where they are not needed."""
    if not settings.needs_data:
        return None
    assert run.data is not None
    split = run.data.train if run.data.train is not None else run.data.val
    return samples(split, model.spec.input, settings.images, seed=run.seed, device=str(run.device))


CountsFor = Callable[[Cost, float], dict[str, int]]
"""Cost and the most it may be -> units every group keeps."""


def _curves(
    settings: Prune,
    model: Model,
    analysis: Analysis,
    scores: Mapping[str, np.ndarray],
    batches: Batches | None,
    run: Run,
) -> dict[str, Curve]:
    """What each group costs; none where the scope does not ask."""
    if settings.scope != "global":
        return {}
    if not settings.sensitivity:
        return summed_curves(
            analysis.groups,
            scores,
            is_comparable=settings.importance in COMPARABLE,
            round_to=settings.round_to,
            min_fraction=settings.min_fraction,
        )
    assert batches is not None
    return measured_curves(
        model.module,
        analysis,
        scores,
        batches,
        round_to=settings.round_to,
        min_fraction=settings.min_fraction,
        repair=settings.compensate,
        progress=run.progress,
    )


def _allocator(
    settings: Prune,
    model: Model,
    analysis: Analysis,
    scores: Mapping[str, np.ndarray],
    curves: Mapping[str, Curve],
) -> CountsFor:
    if settings.scope == "global":
        return lambda cost, goal: allocate(curves, cost, goal)
    return lambda cost, goal: _uniformly(settings, analysis, scores, model.module, cost, goal)


def _counted(goal: str, analysis: Analysis, sizes: Sizes) -> Cost:
    """Operations or parameters of the network with given counts."""
    if goal == "parameters":
        return lambda counts: float(sizes.parameters(counts))
    return lambda counts: float(macs(analysis.trace, sizes.shapes(counts)))


def _blocks(
    settings: Prune,
    model: Model,
    reference: Model,
    share: float,
    batches: Batches | None,
    run: Run,
    predictor: LatencyModel | None,
) -> Callable[[DropBlocks | None], DropBlocks | None]:
    """What chooses blocks: for None those that cost less than channels would, at the price channels have when they
    alone reach the goal; for blocks that were too few, these and more, or None."""
    assert batches is not None
    analysis = analyze(model.module, model.spec.input, settings.attention, run.seed)
    scores = score(model.module, analysis.groups, settings.importance, batches=batches, seed=run.seed)
    curves = _curves(settings, model, analysis, scores, batches, run)
    sizes = Sizes(analysis)
    if predictor is not None:
        of_trace: Callable[[Trace], float] = predictor.predict
        cost: Cost = lambda counts: predictor.predict(analysis.trace, sizes.shapes(counts))  # noqa: E731
        whole = of_trace(trace(reference.module, reference.spec.input))
    else:
        cost, whole = _counted(settings.goal, analysis, sizes), _whole(settings.goal, reference)
        of_trace = _parameters_of if settings.goal == "parameters" else lambda found: float(macs(found))
    counts = allocate(curves, cost, share * whole)
    loss = sum(float(curve.losses[curve.counts.index(counts[name])]) for name, curve in curves.items())
    saved = max(cost(sizes.full) - cost(counts), 1e-9)
    price = loss / saved
    return lambda start: cheap_blocks(
        model.module, model.spec.input, of_trace, share * whole, price, batches, run.progress, start
    )


def _parameters_of(found: Trace) -> float:
    buffers = set(found.program.graph_signature.buffers)
    return float(
        sum(
            int(np.prod(found.shapes[name])) for name, path in found.parameters.items() if path not in buffers
        )
    )


def _uniformly(
    settings: Prune,
    analysis: Analysis,
    scores: Mapping[str, np.ndarray],
    module: nn.Module,
    cost: Cost,
    goal: float,
) -> dict[str, int]:
    """The smallest share that, taken everywhere alike, reaches the goal: bisected."""

    def counts(amount: float) -> dict[str, int]:
        keep = _by_ratio(settings, analysis, scores, amount, module)
        return {name: int(mask.sum()) for name, mask in keep.items()}

    low, high = 0.0, 0.999
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(counts(middle)) <= goal else (middle, high)
    return counts(high)


def _by_ratio(
    settings: Prune, analysis: Analysis, scores: Mapping[str, np.ndarray], amount: float, module: nn.Module
) -> dict[str, np.ndarray]:
    return select(
        analysis.groups,
        scores,
        settings.scope,
        amount,
        module=module,
        round_to=settings.round_to,
        min_fraction=settings.min_fraction,
    )


def _whole(goal: str, reference: Model) -> float:
    """The reference's operations or parameters."""
    if goal == "parameters":
        return float(reference.num_parameters)
    return float(macs(trace(reference.module, reference.spec.input)))


def _figures(analysis: Analysis, sizes: Sizes, keep: Mapping[str, np.ndarray]) -> dict[str, float]:
    counts = {name: int(mask.sum()) for name, mask in keep.items()}
    full = sizes.full
    return {
        "prune/units": sum(counts.values()) / sum(full.values()),
        "prune/macs": macs(analysis.trace, sizes.shapes(counts)) / max(1, macs(analysis.trace)),
        "prune/parameters": sizes.parameters(counts) / max(1, sizes.parameters(full)),
    }
