"""What a run keeps of itself to go on from, and how it goes on."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cveff.errors import CheckpointError
from cveff.model import build
from cveff.train.compute import Compute
from cveff.train.sharded import cut_moments, load_whole
from cveff.train.state import differences, identity, load_state, since_added

if TYPE_CHECKING:
    from cveff.train.loop import Trainer

STATE = "state.safetensors"


def keep_state(run: Trainer) -> None:
    """Write all that the next step depends on into the run's folder; all ranks together.

    Raises:
        CveffError: a file cannot be written, or the disk is full; an earlier state is left as it was.
    """
    assert run.run.folder is not None
    run.spread.save(
        run.run.folder / STATE,
        {
            "settings": _identity(run),
            "step": run.step,
            "finished": run.finished,
            "best_accuracy": run.best_accuracy,
            "best_epoch": run.best_epoch,
            "best_weights": run.best_weights,
            "module": run.module.state_dict(),
            "average": run.average.module.state_dict() if run.average else {},
            "extra": run.extra.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "compute": asdict(run.compute()),
            "begun": run.begun if run.deadline is None else run.deadline.budget.begun,
        },
    )
    run.last_saved = time.monotonic()


def resume(run: Trainer) -> None:
    """Go on from the state in the run's folder, if there is one, on any number of ranks.

    Raises:
        CheckpointError: it is damaged, or belongs to other settings.
    """
    path = run.run.folder / STATE if run.run.folder else None
    if path is None or not path.is_file():
        return
    state = load_state(path)
    defaults = {"train": identity(asdict(type(run.settings)()), {})["train"]}
    changed = differences(since_added(state.get("settings", {}), defaults), _identity(run))
    if changed:
        raise CheckpointError(
            f"{path} was written by a run with other settings ({changed}); resume with the same ones, "
            "or train into another folder"
        )
    spec = run.growth.spec_at(state["step"])
    if spec != run.model.spec:
        run.take(build(spec))
    run.growth.resume(run.module, state["step"])
    run.mask()
    load_whole(run.module, state["module"])
    if run.average:
        load_whole(run.average.module, state["average"])
    run.extra.load_state_dict(state.get("extra", {}))
    run.optimizer.load_state_dict(cut_moments(state["optimizer"], run.optimizer.optimizers))
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    run.step, run.finished = state["step"], state["finished"]
    run.best_accuracy, run.best_epoch = state["best_accuracy"], state["best_epoch"]
    run.best_weights = state["best_weights"]
    run.meter.compute = Compute(**state.get("compute", {}))
    run.begun = state.get("begun")
    run.run.log.rewind(run.step)
    run.run.progress.message(f"resumed at step {run.step} of {run.course.total_steps}")


def _identity(run: Trainer) -> dict[str, Any]:
    return identity(
        asdict(run.settings),
        dict(run.objective.identity()),
        precision=str(run.precision),
        model=run.given.to_json(),
        images=len(run.train_split),
        seed=run.run.seed,
    )
