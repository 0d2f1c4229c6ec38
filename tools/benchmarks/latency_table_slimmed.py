"""Second part of `latency_table.py`: networks slimmed evenly until a time is predicted, built, and timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import common
import numpy as np
from latency_table_models import build

from cveff.compress.analysis import analyze
from cveff.compress.groups import Analysis
from cveff.compress.latency_model import LatencyModel
from cveff.export.timer import EngineTimer
from cveff.measure.latency import Clock
from cveff.model import with_module
from cveff.target import Target

SLIMMED = (
    "mobilenetv4_conv_small",
    "mobilenetv3_large_100",
    "efficientnet_lite0",
    "resnet18",
    "resnet50",
    "regnety_004",
    "convnext_atto",
    "vit_tiny_patch16_224",
)
GOALS = (0.75, 0.5)
GOAL_BAR = 0.07


def slimmed(names: Sequence[str], model: LatencyModel, seconds: float, clock: Clock) -> list[dict[str, Any]]:
    """Networks slimmed to a time by prediction alone, built and timed; then once more, corrected by what was found."""
    target = Target("table", "the table's engine", ((model.table.engine, "fp32"),), model.table.threads, (1,))
    found = []
    for name in [name for name in SLIMMED if name in names]:
        dense = build(name)
        analysis = analyze(dense.module, dense.spec.input)
        with EngineTimer(target, seconds=seconds, clock=clock) as timer:
            first = timer.milliseconds({"dense": dense})["dense"]
            anchors = dict.fromkeys(GOALS, model.anchored(analysis.trace, first))
            shares: list[dict[float, float]] = []
            for _ in range(2):
                models, shapes = {"dense": dense}, {}
                for goal in GOALS:
                    keep = slim_to(analysis, anchors[goal], goal * first)
                    shapes[goal] = analysis.shapes(keep)
                    edit, fresh = analysis.edit(keep, dense.module), build(name)
                    models[str(goal)] = with_module(fresh, edit.apply(fresh.module), edit)
                timed = timer.compare(models)
                # Paired with the dense network, round by round.
                shares.append({goal: 1 / timed[str(goal)].speedup.median for goal in GOALS})
                predictions = {
                    goal: anchors[goal].predict(analysis.trace, shapes[goal]) / first for goal in GOALS
                }
                if len(shares) == 1:
                    predicted = predictions
                for goal in GOALS:
                    measured_ms = shares[-1][goal] * first
                    anchors[goal] = anchors[goal].anchored(analysis.trace, measured_ms, shapes[goal])
        for goal in GOALS:
            corrected = shares[1][goal]  # the second, whether or not it is the closer
            found.append(
                {
                    "model": name,
                    "goal": goal,
                    "predicted": predicted[goal],
                    "measured": shares[0][goal],
                    "error": shares[0][goal] / goal - 1,
                    "corrected": corrected,
                    "corrected_error": corrected / goal - 1,
                    "dense_ms": first,
                }
            )
        common.console.print(
            f"{name}: " + ", ".join(f"{i['goal']} -> {i['measured']:.3f}" for i in found[-2:])
        )
    return found


def slim_to(analysis: Analysis, model: LatencyModel, milliseconds: float) -> dict[str, np.ndarray]:
    """The same share of every group, in steps of 8 channels, that is predicted closest to a time."""
    candidates = [even(analysis, share) for share in np.linspace(0.1, 1, 91)]
    times = [model.predict(analysis.trace, analysis.shapes(keep)) for keep in candidates]
    return candidates[int(np.argmin(np.abs(np.array(times) - milliseconds)))]


def even(analysis: Analysis, share: float) -> dict[str, np.ndarray]:
    """The first `share` of every group's units: multiples of 8, or of 1 where there are under 16."""
    keep = {}
    for group in analysis.groups:
        step = 8 if group.size >= 16 else 1
        keep[group.name] = np.arange(group.size) < max(step, step * round(group.size * share / step))
    return keep


def show_slimmed(threads: int, cell: Mapping[str, Any]) -> None:
    """Print how slimmed networks met their times."""
    common.table(
        f"Time asked for, as a share of the dense network's, {threads} thread{'s' * (threads > 1)}",
        ("model", "goal", "predicted", "measured", "error %", "corrected", "error %"),
        [
            [
                *(item[key] for key in ("model", "goal", "predicted", "measured")),
                100 * item["error"],
                item["corrected"],
                100 * item["corrected_error"],
            ]
            for item in cell["slimmed"]
        ],
        note=f"Within {GOAL_BAR:.0%}: {cell['goals_met']} of {len(cell['slimmed'])} by prediction alone, "
        f"{cell['goals_met_corrected']} after one measurement.",
    )
