"""`Prune`: take channels, heads and blocks out of a network until it meets a goal on the device."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from cveff.compress.analysis import light_copy
from cveff.compress.batch_norm import recalibrate_batch_norm
from cveff.compress.compensate import compensate
from cveff.compress.distill import Distill
from cveff.compress.importance import DATA_CRITERIA, Criterion
from cveff.compress.ownership import Attention
from cveff.compress.prune_plan import Plan, calibration, make_plan, without_blocks
from cveff.compress.samples import Batches
from cveff.errors import StepError
from cveff.files import write_json
from cveff.model import Model, with_module
from cveff.steps import Run

PruneScope = Literal["global", "local", "isomorphic"]

GOALS = ("latency", "latency_ms", "macs", "parameters", "ratio")


@dataclass(frozen=True)
class Prune:
    """Structured pruning to a goal, of which exactly one is given.

    Attributes:
        latency: share of the given model's own latency, both measured as exported float32 files on the target.
        latency_ms: milliseconds a call on the target, at its first batch size.
        macs: share of the multiply-accumulate operations that is left.
        parameters: share of the parameters that is left.
        ratio: share of every group's units that goes (with scope "global": of all units).
        importance: which units of a group go first: "magnitude" (Fang et al. 2023), "taylor" (Molchanov et al.
            2019), "hessian" (LeCun et al. 1989), "activation" (what the next layer would miss) or "random".
        scope: how much of each group goes. "global": where it buys the most of the goal for the least loss;
            "local": the same share everywhere; "isomorphic": global among layers of one topology (Fang et al. 2024).
        sensitivity: with scope "global", measure what each group costs by pruning it alone, instead of adding scores.
        attention: what one unit of attention is: a head, or one dimension of every head.
        depth: whole residual blocks may go as well, where that is cheaper than channels, or where channels alone do not
            reach the goal.
        round_to: channels are left in multiples of this; by default of the target's `channel_multiple`, or of 8.
        min_fraction: the least share of a group that stays.
        rounds: prune this many times, each a part of the way, with `recover` after each.
        images: how many images importance, sensitivity and repair look at.
        compensate: let the channels that stay stand in for those that go, by least squares (He et al. 2017), and
            re-estimate batch norms.
        recover: fine-tuning after each round.

    Raises:
        StepError: at construction, for no goal or several, or a value out of range.
    """

    latency: float | None = None
    latency_ms: float | None = None
    macs: float | None = None
    parameters: float | None = None
    ratio: float | None = None
    importance: Criterion = "activation"
    scope: PruneScope = "global"
    sensitivity: bool = True
    attention: Attention = "heads"
    depth: bool = False
    round_to: int | None = None
    min_fraction: float = 0.1
    rounds: int = 1
    images: int = 512
    compensate: bool = True
    recover: Distill | None = None

    kind: ClassVar[str] = "prune"
    requires: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        given = [name for name in GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise StepError(f"prune takes one goal of {', '.join(GOALS)}, and got {found}")
        value = self.amount
        if self.goal == "latency_ms":
            self._check("latency_ms", 0 < value < float("inf"), "a positive number of milliseconds")
        else:
            wanted = "the share that goes" if self.goal == "ratio" else "the share that is left"
            self._check(self.goal, 0 < value < 1, f"a number between 0 and 1, {wanted}")
        self._check("importance", self.importance in get_args(Criterion), ", ".join(get_args(Criterion)))
        self._check("scope", self.scope in get_args(PruneScope), ", ".join(get_args(PruneScope)))
        self._check("attention", self.attention in get_args(Attention), ", ".join(get_args(Attention)))
        if self.depth and (self.scope != "global" or not self.sensitivity or self.goal == "ratio"):
            raise StepError(
                "prune.depth weighs blocks against channels by measured loss; it needs scope='global', "
                "sensitivity=True and another goal than ratio"
            )
        self._check("round_to", self.round_to is None or self.round_to >= 1, "1 or more channels")
        self._check("min_fraction", 0 <= self.min_fraction < 1, "a share in [0, 1)")
        self._check("rounds", self.rounds >= 1, "1 or more")
        self._check("images", self.images >= 1, "1 or more")
        # As LowRank: what this instance needs depends on its goal.
        object.__setattr__(self, "requires", ("timer",) if self.goal in ("latency", "latency_ms") else ())

    @property
    def goal(self) -> str:
        """Name of the goal that is given."""
        return next(name for name in GOALS if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """The goal's value."""
        return float(getattr(self, self.goal))

    @property
    def needs_data(self) -> bool:
        """Whether images are needed: for the criterion, for sensitivity, for repair or for fine-tuning."""
        measures = self.scope == "global" and self.sensitivity and self.goal != "ratio"
        return self.importance in DATA_CRITERIA or measures or self.compensate or self.recover is not None

    def __call__(self, model: Model, run: Run) -> Model:
        """Prune, repair, and with `recover` fine-tune.

        Raises:
            StepError: nothing can be pruned, images or a target are missing, or the goal cannot be reached; the
                message says what can.
        """
        self.check_run(run)
        model.module.to(run.device).eval()
        reference, goal = model, self._share(model, run)
        for number in range(1, self.rounds + 1):
            share = goal ** (number / self.rounds)  # every round takes the same share of what is there
            batches = calibration(self, model, run)
            plan = make_plan(self, model, reference, share, batches, run)
            run.progress.message(plan.summary)
            run.log.write(number, plan.figures)
            if run.folder is not None:
                write_json(run.folder / f"prune-{number}.json", plan.to_json())
            model = self._carry_out(plan, model, batches if self.compensate else None)
            if self.recover is not None:
                model = self.recover(model, _of_round(run, number))
                model.module.to(run.device)
        model.module.cpu().eval()
        return model

    def plan(self, model: Model, run: Run) -> Plan:
        """What would be cut, all rounds as one; `model` is left as it is.

        Raises:
            StepError: as a call.
        """
        self.check_run(run)
        model = Model(model.spec, copy.deepcopy(model.module).to(run.device).eval())
        share, batches = self._share(model, run), calibration(self, model, run)
        return make_plan(self, model, model, share, batches, run)

    def _share(self, model: Model, run: Run) -> float:
        """The share that is to be left of whatever the goal counts."""
        if self.goal == "ratio":
            return 1 - self.amount
        if self.goal != "latency_ms":
            return self.amount
        assert run.timer is not None
        whole = run.timer.milliseconds({"reference": model})["reference"]
        if self.amount >= whole:
            raise StepError(
                f"prune.latency_ms is {self.amount:g}, and the model takes {whole:.3g} ms already; ask for less"
            )
        return self.amount / whole

    def _carry_out(self, plan: Plan, model: Model, batches: Batches | None) -> Model:
        """Repair what stays, cut what goes, re-estimate batch norms; without images, cut only."""
        if plan.drop is not None:
            model = without_blocks(self, model, plan.drop, batches)
        module = model.module
        if batches is not None:
            found = compensate(module, plan.analysis.groups, plan.keep, batches, trace=plan.analysis.trace)
            module = copy.deepcopy(module)
            module.load_state_dict(found.state, strict=False)
        edit = plan.analysis.edit(plan.keep, module)
        small = edit.apply(light_copy(module)).eval()
        if batches is not None:
            recalibrate_batch_norm(small, batches)
        return with_module(model, small, edit)

    def check_run(self, run: Run) -> None:
        """Refuse a run that lacks what these settings need, before anything is computed.

        Raises:
            StepError: naming what is missing.
        """
        if self.needs_data and run.data is None:
            raise StepError(
                "prune looks at images (importance, sensitivity or repair); pass data=…, or set "
                "importance='magnitude', sensitivity=False and compensate=False"
            )

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise StepError(f"prune.{name} is {getattr(self, name)!r}; give {wanted}")


def _of_round(run: Run, number: int) -> Run:
    """The same run with a folder of its own for one round's training state."""
    return run if run.folder is None else replace(run, folder=run.folder / f"round-{number}")
