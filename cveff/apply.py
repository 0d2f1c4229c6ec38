"""`apply`: the one verb through which every method changes a model. A method is a `Step`: settings with a call."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import cast

import torch

from cveff.data.dataset import Data
from cveff.edits import Edit
from cveff.errors import StepError
from cveff.log import Log, NoLog
from cveff.model import Model, with_module
from cveff.progress import Progress, Silent
from cveff.steps import ModelTimer, Run, Step
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

    Raises:
        StepError: something is neither a step nor an edit, or a step lacks what it needs (said before any
            step starts).
    """
    sequence = cast("list[Step | Edit]", list(steps) if isinstance(steps, (list, tuple)) else [steps])
    teacher = model if teacher is None else teacher
    given = {
        "data": data,
        "target": target,
        "teacher": teacher,
        "folder": folder,
        "timer": target if timer is None else timer,
    }
    for step in sequence:
        if isinstance(step, type) or not isinstance(step, (Step, Edit)):
            raise StepError(
                f"{step!r} is neither a step nor an edit; give an instance such as Prune(ratio=0.5)"
            )
        for name in getattr(step, "requires", ()):
            if given.get(name) is None:
                name = "target" if name == "timer" else name
                raise StepError(f"{type(step).__name__} needs {name}; pass {name}=… to cveff.apply")
    if data is not None and not isinstance(data, Data):
        from cveff.data import load as load_data

        data = load_data(data, seed=seed)
    target = None if target is None else load_target(target)
    with ExitStack() as stack:
        if timer is None and target is not None:
            from cveff.export.timer import EngineTimer

            timer = stack.enter_context(EngineTimer(target))  # exports nothing until a step asks
        run = Run(
            data=data,
            target=target,
            device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            seed=seed,
            progress=progress or Silent(),
            log=log or NoLog(),
            teacher=teacher,
            folder=None if folder is None else Path(folder),
            resume=resume,
            timer=timer,
        )
        model = Model(model.spec, copy.deepcopy(model.module))
        for step in sequence:
            model = (
                step(model, run)
                if isinstance(step, Step)
                else with_module(model, step.apply(model.module), step)
            )
    return model


class _Verb(ModuleType):
    """`cveff.apply` is a verb and the module it lives in; importing the module must not take the verb away."""

    __call__ = staticmethod(apply)


sys.modules[__name__].__class__ = _Verb
