"""Everything `deploy` measures: scores, the gap between file and engine, memory, times; then the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cveff.errors import EngineError, StepError
from cveff.export.build_candidates import ONNX, Built, build_candidates
from cveff.export.candidates import Candidate, Limits, choose, rejection
from cveff.export.deploy_checks import Images
from cveff.export.instructions import instruction_warnings
from cveff.export.int8 import Int8
from cveff.export.kernel_gap import gap_warnings, has_kernels, num_gap_images, with_kernel_gap
from cveff.export.scoring import REFERENCE, Scores, first_images, score, time_all
from cveff.measure.latency import Latency
from cveff.measure.memory import Memory, peak_memory
from cveff.measure.predictor import Predictor, torch_predictor
from cveff.measure.threads import pinned_threads
from cveff.model import Model
from cveff.progress import Progress
from cveff.runtime.input_spec import InputSpec
from cveff.target import Target

DECIDING_SECONDS, OTHER_SECONDS = 8.0, 3.0
"""Time for rounds at the batch size that decides, and at each other one."""


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        candidates: decided, exactly one of them chosen; `chosen` is that one.
        selection, evaluation: answers on the selection images of all, on the evaluation images of the original
            and the chosen.
        timings: the original module's, by batch size.
        memory: of a fresh process that runs the chosen one.
        warnings: what a reader must know before trusting a candidate.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    selection: Scores
    evaluation: Scores
    timings: Mapping[int, Latency]
    memory: Memory
    warnings: tuple[str, ...]


def measure(
    original: Model,
    int8: Int8,
    images: Images,
    target: Target,
    max_accuracy_drop: float,
    work: Path,
    seed: int,
    progress: Progress,
) -> Measured:
    """Build, score, time and choose.

    Args:
        original: the module before any merging or folding, in evaluation mode; everything is compared with it.
        int8: files in integers of what `model.onnx` was exported from.
        work: holds the exported `model.onnx`; candidates' files are written there.

    Raises:
        TargetError: no candidate is left.
        StepError: the original itself does not give finite answers.
    """
    spec = original.spec.input
    with ExitStack() as stack:
        stack.enter_context(pinned_threads(target.num_threads))
        built = build_candidates(work / ONNX, target, int8, work, progress)
        stack.callback(built.close)
        reference = torch_predictor(original, target.num_threads)
        predictors: dict[str, Predictor] = {REFERENCE: reference, **built.sessions, **built.stand_ins}
        selection = score(
            predictors, images.selection, spec, progress, f"measuring on {images.selection.name}"
        )
        if REFERENCE in selection.errors:
            raise StepError(f"the model itself cannot be measured: {selection.errors[REFERENCE]}")
        limits = Limits(max_accuracy_drop, selection.accuracy(REFERENCE), target.memory_mb)
        batch = first_images(images.selection, spec, max(target.batch_sizes))
        candidates = [_scored(candidate, selection) for candidate in built.candidates]
        candidates = _with_gaps(candidates, images, spec, selection, progress)
        memories: dict[str, Memory] = {}
        if target.memory_mb:
            candidates = [_with_memory(c, batch, target, memories) for c in candidates]
        candidates, timings = _time(candidates, limits, built, reference, batch, target, seed, progress)
        decided = choose(candidates, limits, target.batch_sizes[0])
        chosen = next(candidate for candidate in decided if candidate.chosen)
        evaluation = selection
        if images.evaluation is not images.selection:
            pair: dict[str, Predictor] = {REFERENCE: reference, chosen.name: built.sessions[chosen.name]}
            evaluation = score(
                pair, images.evaluation, spec, progress, f"measuring on {images.evaluation.name}"
            )
            if evaluation.errors:
                raise EngineError(
                    f"measuring on {images.evaluation.name}: {next(iter(evaluation.errors.values()))}"
                )
    if chosen.name not in memories:
        chosen = _with_memory(chosen, batch, target, memories)
        decided = tuple(chosen if candidate.chosen else candidate for candidate in decided)
    notes = built.sessions[chosen.name].notes
    warnings = (*gap_warnings(decided), *instruction_warnings(target, decided), *notes)
    return Measured(decided, chosen, selection, evaluation, timings, memories[chosen.name], warnings)


def _time(
    candidates: Sequence[Candidate],
    limits: Limits,
    built: Built,
    reference: Predictor,
    images: np.ndarray,
    target: Target,
    seed: int,
    progress: Progress,
) -> tuple[list[Candidate], dict[int, Latency]]:
    """Time what may ship in turns with the original; then the rejected among themselves, for the report."""
    runnable = [c for c in candidates if not c.error]
    kept = {c.name: built.sessions[c.name] for c in runnable if not rejection(c, limits)}
    rejected = {c.name: built.sessions[c.name] for c in runnable if c.name not in kept}
    timings: dict[str, dict[int, Latency]] = {}
    sizes = list(dict.fromkeys(target.batch_sizes))
    for position, size in enumerate(progress.track(sizes, "timing", len(sizes))):
        budget = DECIDING_SECONDS if position == 0 else OTHER_SECONDS
        found = time_all({REFERENCE: reference, **kept}, images, size, budget_seconds=budget, seed=seed)
        if rejected:
            found |= time_all(rejected, images, size, budget_seconds=OTHER_SECONDS / 2, seed=seed)
        for name, latency in found.items():
            timings.setdefault(name, {})[size] = latency
    timed = [replace(c, timings=timings.get(c.name, {})) for c in candidates]
    return timed, timings[REFERENCE]


def _scored(candidate: Candidate, scores: Scores) -> Candidate:
    name = candidate.name
    if name not in scores.logits:
        return replace(candidate, error=candidate.error or scores.errors[name])
    return replace(
        candidate,
        accuracy=scores.accuracy(name),
        agreement=scores.agreement(name, REFERENCE),
        relative_difference=scores.relative_difference(name, REFERENCE),
    )


def _with_gaps(
    candidates: Sequence[Candidate], images: Images, spec: InputSpec, scores: Scores, progress: Progress
) -> list[Candidate]:
    """What integer kernels answer against what their files say."""
    if not any(has_kernels(candidate) for candidate in candidates):
        return list(candidates)
    pixels = first_images(images.selection, spec, num_gap_images(spec.size))
    found = []
    for candidate in candidates:
        if has_kernels(candidate):
            progress.message(f"{candidate.name}: comparing the engine's answers with the file as written")
            candidate = with_kernel_gap(candidate, pixels, scores.logits[candidate.name][: len(pixels)])
        found.append(candidate)
    return found


def _with_memory(
    candidate: Candidate, images: np.ndarray, target: Target, memories: dict[str, Memory]
) -> Candidate:
    if candidate.error:
        return candidate
    assert candidate.path is not None
    memory = peak_memory(
        candidate.engine,
        candidate.path,
        np.resize(images, (target.batch_sizes[0], *images.shape[1:])),
        threads=candidate.threads,
        options=candidate.options,
    )
    memories[candidate.name] = memory
    return replace(candidate, peak_rss_bytes=memory.peak_rss_bytes)
