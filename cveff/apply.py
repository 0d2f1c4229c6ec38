"""`apply`: the one verb through which every method changes a model. A method is a `Step`: settings with a call."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import cast

import torch

from cveff.data.dataset import Data
from cveff.edits import Edit, objection
from cveff.errors import StepError
from cveff.log import Log, NoLog
from cveff.model import Model, with_module
from cveff.progress import Progress, Silent
from cveff.steps import ChecksRun, Clock, ModelTimer, Run, Step
from cveff.target import Target, load_target


def apply(
    model: Model,
    steps: Step | Edit | Sequence[Step | Edit],
    *,
    data: Data | str | Path | None = None,
    target: Target | str | Path | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    teacher: Model | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    timer: ModelTimer | None = None,
    clock: Clock | None = None,
) -> Model:
    """Apply steps and edits in order and return a new model; the old one is untouched.

    Args:
        steps: a step, an edit, or a list of them.
        data: a `Data`, or a source that `cveff.data.load` reads.
        target: a `Target`, the name of a profile, or a profile's file.
        device: where torch computes; by default a GPU if there is one.
        seed: all randomness derives from it.
        teacher: a model to imitate; by default `model` as it comes in.
        folder: where steps keep the state they resume from.
        resume: continue from that state.
        timer: what times models; by default, where there is a target, its first float32 engine.
        clock: what a training budget counts from; by default the training's start.

    Raises:
        StepError: something is neither a step nor an edit, or a step lacks what it needs (said before any
            step starts).
    """
    sequence = cast("list[Step | Edit]", list(steps) if isinstance(steps, (list, tuple)) else [steps])
    for step in sequence:
        if isinstance(step, type) or not isinstance(step, (Step, Edit)):
            raise StepError(
                f"{step!r} is neither a step nor an edit; give an instance such as Prune(ratio=0.5)"
            )
        _check_order(model, step)
    if model.spec.task != "classification":
        raise StepError(
            f"{model.spec.architecture} is a {model.spec.task} model; steps are for classification models"
        )
    target = None if target is None else load_target(target)
    run = Run(
        target=target,
        device=device_of(device),
        seed=seed,
        progress=progress or Silent(),
        log=log or NoLog(),
        teacher=model if teacher is None else teacher,
        folder=None if folder is None else Path(folder),
        resume=resume,
        timer=timer,
        clock=clock,
    )
    with ExitStack() as stack:
        if run.timer is None and target is not None:
            run.timer = stack.enter_context(timer_of(target))  # exports nothing until a step asks
        if data is not None and not isinstance(data, Data):
            from cveff.data import load as load_data

            _check_required(sequence, run, has_data=True)  # before what may take long
            data = load_data(data, seed=seed)
        run.data = data
        check_steps(sequence, run)
        model = Model(model.spec, copy.deepcopy(model.module))
        for step in sequence:
            _check_order(model, step)
            model = (
                step(model, run)
                if isinstance(step, Step)
                else with_module(model, step.apply(model.module), step)
            )
    return model


def _check_order(model: Model, step: Step | Edit) -> None:
    if (reason := objection(model.spec.edits, step.kind)) is not None:
        raise StepError(reason)


def device_of(device: torch.device | str | None) -> torch.device:
    """Where torch computes: what is asked for, or a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_steps(steps: Sequence[Step | Edit], run: Run) -> None:
    """Refuse what some step could not be done with, before any starts.

    Raises:
        StepError: a step lacks what it `requires`, or its `check_run` refuses.
    """
    _check_required(steps, run, has_data=run.data is not None)
    for step in steps:
        for part in (step, getattr(step, "recover", None)):
            if isinstance(part, ChecksRun):
                part.check_run(run)


def needs_timer(step: Step | Edit) -> bool:
    """Whether a step measures milliseconds, and so needs a target."""
    return not {"target", "timer"}.isdisjoint(getattr(step, "requires", ()))


@contextmanager
def timer_of(target: Target) -> Iterator[ModelTimer | None]:
    """What times models for `target`, until the block ends; None where the target has no float32 candidate."""
    if all(precision != "fp32" for _, precision in target.candidates):
        yield None
        return
    from cveff.export.timer import EngineTimer

    with EngineTimer(target) as timer:
        yield timer


def _check_required(steps: Sequence[Step | Edit], run: Run, has_data: bool) -> None:
    for step in steps:
        for name in getattr(step, "requires", ()):
            if getattr(run, name) is not None or (name == "data" and has_data):
                continue
            if name == "timer" and run.target is not None:
                raise StepError(
                    f"{type(step).__name__} times models, and target {run.target.name!r} has no fp32 candidate to "
                    "time them on; add one"
                )
            name = "target" if name == "timer" else name
            raise StepError(f"{type(step).__name__} needs {name}; pass {name}=… to cveff.apply")


class _Verb(ModuleType):
    """`cveff.apply` is a verb and the module it lives in; importing the module must not take the verb away."""

    __call__ = staticmethod(apply)


sys.modules[__name__].__class__ = _Verb
