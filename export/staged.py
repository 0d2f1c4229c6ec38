"""A staged bundle from its files: every exit's answers, measured times, thresholds, and proof on other images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cveff.data.dataset import Split
from cveff.dynamic.thresholds import Choice, Frontier, Goal
from cveff.errors import EngineError
from cveff.export.scoring import SCORING_BATCH, first_images
from cveff.export.streams import STREAM_CALLS, Stream, stream_times
from cveff.measure.accuracy import agreement, top1
from cveff.measure.latency import Latency, compare
from cveff.measure.memory import Memory
from cveff.measure.parity import relative_difference
from cveff.measure.predictor import Predictor
from cveff.measure.size import size_bytes
from cveff.measure.threads import pinned_threads
from cveff.progress import Progress
from cveff.runtime.cascade import Cascade
from cveff.runtime.engines import open_file
from cveff.runtime.gates import certainty
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.manifest import ModelFile
from cveff.runtime.stages import Stage, Stages

STAGE_SECONDS, STREAM_SECONDS = 8.0, 8.0
"""Time for rounds of single images through the first stages, and of streams of images at each batch size."""


@dataclass(frozen=True)
class Parts:
    """What a staged bundle is made of.

    Attributes:
        folder: holds every file by its name in the bundle.
        stages: in order, their thresholds not yet known.
        full: the whole network by itself, or the last of several: what shares of time and lost points are against.
        files: names of all files, those that only lie beside others among them.
        description: of the model, for the manifest: name, architecture, parameters, edits.
        reference: the original that accuracy is also compared with, and what to call it; None: `full` is the original.
    """

    folder: Path
    stages: tuple[Stage, ...]
    full: ModelFile
    files: tuple[str, ...]
    input: InputSpec
    labels: tuple[str, ...]
    description: Mapping[str, Any]
    full_name: str
    reference: tuple[str, Predictor] | None = None


@dataclass(frozen=True)
class Staged:
    """What was measured.

    Attributes:
        stages: with thresholds, and how many images left at each.
        milliseconds: of one image that leaves at each; `full_ms`: through the whole network's file.
        choice, curve: on the `selection` images.
        logits, left: of the deployed stages on the `evaluation` images, and where each image left.
        full_logits, reference_logits: of the whole network's file and of the original on the same.
        streams: batch size -> times of a call, of the stages, the whole network's file and the original.
        targets: of the evaluation images, or None.
    """

    stages: Stages
    milliseconds: tuple[float, ...]
    full_ms: float
    choice: Choice
    curve: tuple[Choice, ...]
    full_accuracy: float
    logits: np.ndarray
    left: np.ndarray
    full_logits: np.ndarray
    reference_logits: np.ndarray
    streams: Mapping[int, Mapping[str, Latency]]
    targets: np.ndarray | None
    size_bytes: int


def measure_stages(
    parts: Parts,
    selection: Split,
    evaluation: Split,
    *,
    goal: Goal,
    gate: str,
    threads: int,
    batch_sizes: Sequence[int],
    seed: int,
    progress: Progress,
) -> Staged:
    """Measure every stage, choose thresholds on `selection`, and measure what they do on `evaluation`.

    Without labels the whole network's answers stand for them.

    Raises:
        StepError: no thresholds meet the goal.
        EngineError: a file cannot be run.
    """
    with ExitStack() as stack:
        stack.enter_context(pinned_threads(threads))
        stages = Stages(gate, parts.stages)
        cascade = stack.enter_context(
            Cascade(parts.folder, stages, parts.input, parts.labels, threads=threads)
        )
        full = stack.enter_context(
            open_file(
                parts.full.engine, parts.folder / parts.full.file, threads=threads, options=parts.full.options
            )
        )
        progress.message(f"every exit's answers to {len(selection):,} images of {selection.name}")
        answers = _answers(cascade, selection, parts.input)
        images = first_images(selection, parts.input, STREAM_CALLS * max(1, *batch_sizes))
        progress.message("timing stages in turns")
        milliseconds, full_ms = _times(cascade, full, images[:1], seed)
        targets = answers[-1].argmax(axis=1) if selection.targets is None else selection.targets
        frontier = Frontier(
            np.stack([certainty(logits, gate) for logits in answers]),
            np.stack([logits.argmax(axis=1) == targets for logits in answers]),
            milliseconds,
            full_ms,
        )
        choice = frontier.choose(goal)
        cascade.thresholds = choice.thresholds
        progress.message(f"measuring on {len(evaluation):,} images of {evaluation.name}")
        reference = full if parts.reference is None else parts.reference[1]
        logits, left, full_logits, reference_logits = _evaluate(
            cascade, full, reference, evaluation, parts.input
        )
        predictors: dict[str, Predictor] = {"full": full, "stages": cascade, "reference": reference}
        streams = {
            batch: _stream(predictors, images, batch, seed)
            for batch in progress.track(tuple(batch_sizes), "timing streams", len(batch_sizes))
        }
    chosen = tuple(
        replace(stage, threshold=threshold, exits=count)
        for stage, threshold, count in zip(
            parts.stages, (*choice.thresholds, float("inf")), choice.exits, strict=True
        )
    )
    return Staged(
        stages=Stages(gate, chosen),
        milliseconds=tuple(milliseconds),
        full_ms=full_ms,
        choice=choice,
        curve=tuple(frontier.curve()),
        full_accuracy=frontier.full_accuracy,
        logits=logits,
        left=left,
        full_logits=full_logits,
        reference_logits=reference_logits,
        streams=streams,
        targets=evaluation.targets,
        size_bytes=sum(
            size_bytes(parts.folder / file) for file in {stage.file.file: None for stage in parts.stages}
        ),
    )


def staged_manifest(
    parts: Parts,
    staged: Staged,
    memory: Memory,
    selection: Split,
    evaluation: Split,
    goal: Goal,
    threads: int,
) -> dict[str, Any]:
    """Every key of the manifest that was measured; `recipe`, `versions` and `machine` are the caller's."""
    full_name = parts.full_name
    reference_name = full_name if parts.reference is None else parts.reference[0]
    first = min(staged.streams)
    latencies = [_latency(batch, threads, found) for batch, found in staged.streams.items()]
    deciding = next(item for item in latencies if item["batch"] == first)
    accuracy, of_full, of_reference = (
        None if staged.targets is None else top1(logits, staged.targets)
        for logits in (staged.logits, staged.full_logits, staged.reference_logits)
    )
    exits = np.bincount(staged.left, minlength=len(staged.stages.stages))
    precision = parts.full.precision or "fp32"
    share = next(item["staged_over_full"] for item in latencies if item["batch"] == first)
    lost = "" if accuracy is None or of_full is None else f", {100 * (accuracy - of_full):+.2f} points"
    return {
        "model": dict(parts.description),
        "task": "classification",
        "input": parts.input.to_json(),
        "labels": list(parts.labels),
        "engine": {
            "name": parts.full.engine,
            "precision": precision,
            "file": parts.full.file,
            "threads": threads,
            "options": dict(parts.full.options),
        },
        "alternatives": [],
        "metrics": {
            "accuracy": {"reference": of_reference, "deployed": accuracy},
            "agreement": agreement(staged.logits, staged.reference_logits),
            "parity": {
                "max_relative_difference": relative_difference(staged.full_logits, staged.reference_logits)
            },
            "latency_ms": {
                key: deciding[key] for key in ("batch", "threads", "median", "p90", "reference_median")
            },
            "latencies": latencies,
            "peak_rss_bytes": memory.peak_rss_bytes,
            "memory": memory.to_json(),
            "size_bytes": staged.size_bytes,
            "images": {"split": evaluation.name, "count": len(evaluation)},
            "selection": {
                "split": selection.name,
                "count": len(selection),
                "reference_accuracy": None if selection.targets is None else staged.full_accuracy,
                "max_accuracy_drop": 100.0 if goal.accuracy_drop is None else goal.accuracy_drop,
            },
        },
        "candidates": [
            {
                "engine": parts.full.engine,
                "precision": precision,
                "accuracy": staged.choice.accuracy if selection.targets is not None else None,
                "agreement": None,
                "relative_difference": None,
                "latency_ms": deciding["median"],
                "latencies": latencies,
                "size_bytes": staged.size_bytes,
                "chosen": True,
                "rejected": False,
                "why": f"{len(parts.stages)} stages: {share:.2f} of {full_name}'s time at batch {first}{lost}",
            }
        ],
        "stages": {
            "gate": staged.stages.gate,
            "files": [stage.to_json() for stage in staged.stages.stages],
            "goal": goal.to_json(),
            "full": {"name": full_name, "latency_ms": staged.full_ms, "accuracy": of_full},
            "reference": reference_name,
            "latency_ms": list(staged.milliseconds),
            "calibration": {"split": selection.name, "count": len(selection), **staged.choice.to_json()},
            "evaluation": {"split": evaluation.name, "count": len(evaluation), "exits": exits.tolist()},
            "curve": [choice.to_json() for choice in staged.curve],
        },
    }


class _Depth:
    """A cascade that every image leaves at one stage."""

    def __init__(self, cascade: Cascade, depth: int) -> None:
        self.threads = cascade.threads
        count = len(cascade.stages) - 1
        self._cascade = cascade
        self._thresholds = [float("inf")] * depth + [float("-inf")] * (count - depth)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._cascade.answer(images, self._thresholds)[0]


def _stream(
    predictors: Mapping[str, Predictor], images: np.ndarray, batch: int, seed: int
) -> dict[str, Latency]:
    streams = {name: Stream(predictor, images, batch) for name, predictor in predictors.items()}
    return stream_times(streams, seconds=STREAM_SECONDS, seed=seed)


def _times(cascade: Cascade, full: Predictor, image: np.ndarray, seed: int) -> tuple[list[float], float]:
    """Of one image that leaves at each stage, and through the whole network's file."""
    count = len(cascade.stages)
    predictors: dict[str, Predictor] = {str(depth): _Depth(cascade, depth) for depth in range(count)}
    found = compare({**predictors, "full": full}, image, budget_seconds=STAGE_SECONDS, seed=seed)
    times = [found[str(depth)].median_ms for depth in range(count)]
    # A later exit cannot be sooner; where it looks so, the two could not be told apart.
    return [float(value) for value in np.maximum.accumulate(times)], found["full"].median_ms


def _answers(cascade: Cascade, split: Split, spec: InputSpec) -> list[np.ndarray]:
    parts = [cascade.exits(images) for images, _ in split.evaluation_batches(spec, SCORING_BATCH)]
    found = [np.concatenate(rows) for rows in zip(*parts, strict=True)]
    for stage, logits in zip(cascade.stages, found, strict=True):
        if not np.isfinite(logits).all():
            raise EngineError(
                f"stage {stage.name!r} gives logits that are not finite; its weights are damaged, or the engine "
                f"overflows"
            )
    return found


def _evaluate(
    cascade: Cascade, full: Predictor, reference: Predictor, split: Split, spec: InputSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rows = []
    for images, _ in split.evaluation_batches(spec, SCORING_BATCH):
        logits, left = cascade.answer(images)
        of_full = full(images)
        rows.append((logits, left, of_full, of_full if reference is full else reference(images)))
    logits, left, of_full, of_reference = (np.concatenate(values) for values in zip(*rows, strict=True))
    return logits, left, of_full, of_reference


def _latency(batch: int, threads: int, found: Mapping[str, Latency]) -> dict[str, Any]:
    staged, full, reference = found["stages"], found["full"], found["reference"]
    return {
        "batch": batch,
        "threads": threads,
        "median": staged.median_ms,
        "p10": staged.p10,
        "p90": staged.p90,
        "images_per_second": staged.throughput,
        "rounds": len(staged.rounds_ms),
        "reference_median": reference.median_ms,
        "full_median": full.median_ms,
        "staged_over_full": float(np.median(np.divide(staged.rounds_ms, full.rounds_ms))),
    }
