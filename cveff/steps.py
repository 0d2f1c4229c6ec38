"""`apply`: the one verb through which every method changes a model. A method is a `Step`: settings with a call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, cast, runtime_checkable

import torch

from cveff.data.dataset import Data
from cveff.edits import Edit
from cveff.errors import StepError
from cveff.log import Log, NoLog
from cveff.model import Model, with_module
from cveff.progress import Progress, Silent
from cveff.target import Target, load_target


@dataclass
class Run:
    """What every step may use.

    Attributes:
        data: images and labels, or None.
        target: the device the model is made for, or None.
        device: where torch computes.
        seed: all randomness derives from it.
        progress, log: how work shows itself and where its figures go.
        teacher: a model to imitate, or None.
        folder: where a step keeps the state it resumes from, or None: nothing is kept.
        resume: continue from that state where there is one.
    """

    data: Data | None = None
    target: Target | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    log: Log = field(default_factory=NoLog)
    teacher: Model | None = None
    folder: Path | None = None
    resume: bool = False


@runtime_checkable
class Step(Protocol):
    """A method: a frozen dataclass whose fields are its settings, with the paper's defaults.

    `requires` names the fields of `Run` it cannot do without; `apply` checks them before anything starts.
    """

    kind: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]

    def __call__(self, model: Model, run: Run) -> Model:
        """Return a changed `model`; it may be modified in place, `apply` hands over a copy."""
        ...


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
) -> Model:
    """Apply steps and edits in order and return a new model; the old one is untouched.

    Args:
        steps: a step, an edit, or a list of them.
        data: a `Data`, or a source that `cveff.data.load` reads.
        target: a `Target`, the name of a profile, or a profile's file.
        device: where torch computes; by default a GPU if there is one.
        seed: all randomness derives from it.
        teacher: a model to imitate.
        folder: where steps keep the state they resume from.
        resume: continue from that state.

    Raises:
        StepError: something is neither a step nor an edit, or a step lacks what it needs (said before any
            step starts).
    """
    sequence = cast("list[Step | Edit]", list(steps) if isinstance(steps, (list, tuple)) else [steps])
    given = {"data": data, "target": target, "teacher": teacher, "folder": folder}
    for step in sequence:
        if isinstance(step, type) or not isinstance(step, (Step, Edit)):
            raise StepError(
                f"{step!r} is neither a step nor an edit; give an instance such as Prune(ratio=0.5)"
            )
        for name in getattr(step, "requires", ()):
            if given.get(name) is None:
                raise StepError(f"{type(step).__name__} needs {name}; pass {name}=… to cveff.apply")
    if data is not None and not isinstance(data, Data):
        from cveff.data import load as load_data

        data = load_data(data, seed=seed)
    run = Run(
        data=data,
        target=None if target is None else load_target(target),
        device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        seed=seed,
        progress=progress or Silent(),
        log=log or NoLog(),
        teacher=teacher,
        folder=None if folder is None else Path(folder),
        resume=resume,
    )
    model = Model(model.spec, copy.deepcopy(model.module))
    for step in sequence:
        model = (
            step(model, run) if isinstance(step, Step) else with_module(model, step.apply(model.module), step)
        )
    return model
