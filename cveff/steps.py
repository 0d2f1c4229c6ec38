"""`Step`: a method as settings with a call; `Run`: what every step may use. `cveff.apply` brings them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch

from cveff.data.dataset import Data
from cveff.log import Log, NoLog
from cveff.model import Model
from cveff.progress import Progress, Silent
from cveff.target import CHANNEL_MULTIPLE, Target


class ModelTimer(Protocol):
    """What tells a step how fast models really are: on the target's engine, not in PyTorch.

    Attributes:
        engine, threads: what it measures on.
    """

    engine: str
    threads: int

    def milliseconds(self, models: Mapping[str, Model]) -> dict[str, float]:
        """Export each model, open the files on the target's engine and threads, and time them in turns.

        Args:
            models: by name; they are left as they are. Within one call times are comparable; between calls
                the machine may have changed, so give what is to be compared together.

        Returns:
            name -> median time of a call at the target's first batch size, in milliseconds.

        Raises:
            CveffError: a model cannot be exported, or the engine cannot open or run it.
        """
        ...


@dataclass(frozen=True)
class Clock:
    """When work began that a budget of time pays for, and what it pays for after training.

    Attributes:
        started: by `time.monotonic`.
        afterwards: times what is done with the trained model within the budget, and returns the seconds; called more
            than once, as machines change their speed. None: nothing is.
    """

    started: float
    afterwards: Callable[[], float] | None = None


@dataclass
class Run:
    """What every step may use.

    Attributes:
        data: images and labels, or None.
        target: the device the model is made for, or None.
        device: where torch computes.
        seed: all randomness derives from it.
        progress, log: how work shows itself and where its figures go.
        teacher: a model to imitate: by default the one the steps began with. Steps share it and leave it as it is:
            its mode, its device and its weights.
        folder: where a step keeps the state it resumes from, or None: nothing is kept.
        resume: continue from that state where there is one.
        timer: times models on the target's engine; None without a target.
        clock: what a training budget counts from; None: it counts from the step's start.
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
    timer: ModelTimer | None = None
    clock: Clock | None = None

    @property
    def channel_multiple(self) -> int:
        """What channels and ranks are multiples of: the target's, or what suits most engines."""
        return CHANNEL_MULTIPLE if self.target is None else self.target.channel_multiple


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


@runtime_checkable
class ChecksRun(Protocol):
    """A step that can tell from a `Run`, before any step starts, that it could not do its work."""

    def check_run(self, run: Run) -> None:
        """
        Raises:
            StepError: naming what is missing or does not fit.
        """
        ...
