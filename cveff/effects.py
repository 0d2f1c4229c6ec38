"""What each phase of a run did: accuracy, operations and parameters as they come, latencies of all phases together.

Accuracy is that of `val`, because a user who compares steps chooses by it; `test` is for the figures at the end. The
record is `effects.json` in the run's folder, so that a run that was stopped does not measure again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cveff.compress.blocks import macs
from cveff.compress.trace import trace
from cveff.errors import CveffError
from cveff.files import write_json
from cveff.measure.size import module_bytes
from cveff.model import Model
from cveff.progress import Progress
from cveff.steps import ModelTimer
from cveff.target import Target

FILE = "effects.json"
START = "start"
"""Name of the model that a run without training begins with."""


@dataclass(frozen=True)
class Effect:
    """What a model is after a phase.

    Attributes:
        name: the phase, such as "1-prune", or "start".
        kind: the step's kind; "start" for the model the run began with.
        accuracy: share of the validation images it gets right, in [0, 1]; None without labels.
        macs: multiply–accumulate operations an image; None where the network cannot be traced.
        parameters: without batch norms' statistics.
        weight_bytes: of parameters and buffers.
        latency_ms: median milliseconds a call of the exported float32 file on the target's engine, timed in turns with
            the other phases' files; None without a target, or where it could not be timed.
    """

    name: str
    kind: str
    accuracy: float | None
    macs: int | None
    parameters: int
    weight_bytes: int
    latency_ms: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class Effects:
    """The record of one run.

    Args:
        folder: the run's.
        score: share of the validation images a model gets right.
        progress: where what could not be measured is said.
    """

    def __init__(self, folder: Path, score: Callable[[Model], float | None], progress: Progress) -> None:
        self._path, self._score, self._progress = folder / FILE, score, progress
        values = _read(self._path, progress)
        self._found = {entry["name"]: Effect(**entry) for entry in values.get("steps", ())}
        self._timing: dict[str, Any] | None = values.get("timing")

    def note(self, name: str, kind: str, model: Model) -> None:
        """Measure everything but time, unless it was measured before."""
        if name in self._found:
            return
        effect = Effect(
            name=name,
            kind=kind,
            accuracy=self._score(model),
            macs=self._macs(name, model),
            parameters=model.num_parameters,
            weight_bytes=module_bytes(model.module),
        )
        self._found[name] = effect
        if effect.accuracy is not None:
            self._progress.message(
                f"{name}: {100 * effect.accuracy:.2f}% of val, {effect.parameters:,} parameters"
            )
        self._write()

    def complete(
        self,
        kinds: Mapping[str, str],
        open_model: Callable[[str], Model],
        timer: ModelTimer | None,
        target: Target | None,
    ) -> tuple[Effect, ...]:
        """Measure what is not known yet, time all models in turns, and give the whole record.

        Args:
            kinds: every phase's kind by its name, in the order of the run.
            open_model: gives the model after a phase; called where something is to be measured.
            timer, target: what times, and on what; None: nothing is timed.
        """
        for name, kind in kinds.items():
            if name not in self._found:
                self.note(name, kind, open_model(name))
        if timer is not None and target is not None:
            self._time(list(kinds), open_model, timer, target)
        return tuple(self._found[name] for name in kinds)

    def _time(
        self, names: Sequence[str], open_model: Callable[[str], Model], timer: ModelTimer, target: Target
    ) -> None:
        timing = {
            "target": target.name,
            "engine": timer.engine,
            "threads": timer.threads,
            "batch": target.batch_sizes[0],
        }
        if self._timing == timing and all(self._found[name].latency_ms is not None for name in names):
            return
        self._progress.message(f"timing {len(names)} models in turns on {timer.engine}")
        try:
            times: Mapping[str, float] = timer.milliseconds({name: open_model(name) for name in names})
        except CveffError as error:
            # The models are made and scored; that they could not be timed does not undo it.
            self._progress.message(f"warning: the phases could not be timed: {error}")
            times = {}
        for name in names:
            self._found[name] = replace(self._found[name], latency_ms=times.get(name))
        self._timing = timing
        self._write()

    def _macs(self, name: str, model: Model) -> int | None:
        try:
            return macs(trace(model.module, model.spec.input))
        except CveffError as error:
            self._progress.message(f"warning: operations of {name} cannot be counted: {error}")
            return None

    def _write(self) -> None:
        steps = [effect.to_json() for effect in self._found.values()]
        write_json(self._path, {"timing": self._timing, "steps": steps})


def _read(path: Path, progress: Progress) -> dict[str, Any]:
    """An earlier record; empty where there is none, or none that can be read: it is measured again."""
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for entry in values["steps"]:
            Effect(**entry)
        return values
    except (ValueError, TypeError, KeyError) as error:
        progress.message(f"warning: {path} is damaged ({error}); what the phases did is measured again")
        return {}
