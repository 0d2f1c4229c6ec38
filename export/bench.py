"""`bench`: time anything against anything in turns, with size, memory and, given data, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cveff.data.dataset import Data
from cveff.errors import CveffError, DataError, EngineError
from cveff.export.scoring import first_images, score
from cveff.export.streams import STREAM_CALLS, Stream, stream_times
from cveff.export.subjects import Source, Subject, open_subject
from cveff.measure.latency import Latency, compare
from cveff.measure.memory import Memory, peak_memory, peak_memory_of_stages
from cveff.measure.predictor import Predictor
from cveff.measure.threads import pinned_threads, usable_cores
from cveff.progress import Progress, Silent
from cveff.runtime.stages import Stages

SECONDS = 10.0
"""Time for rounds at each batch size, where their number is not given."""


@dataclass(frozen=True)
class Figures:
    """One subject at one batch size. Times are milliseconds a call.

    Attributes:
        kind: "module", "onnx", "openvino", "tensorrt", "aot-inductor" or "bundle".
        engine: "torch", or one of `cveff.runtime.engines.ENGINES`; `precision` where a bundle says so, else "".
        median_ms, p10, p90: over all timed calls; `spread` is their interquartile range over the median.
        throughput: images a second at the median.
        speedup: how many times as fast as the first subject, round by round; `speedup_interval` its 95% interval.
        rounds: interleaved rounds.
        accuracy: top-1 share (0..1) on `num_images` images of `split`; None without data.
        size_bytes: of its files, or of a module's weights.
        peak_rss_bytes: of a fresh process that opens the file and predicts; None for a module.
    """

    name: str
    kind: str
    engine: str
    precision: str
    batch: int
    threads: int
    median_ms: float
    p10: float
    p90: float
    spread: float
    throughput: float
    speedup: float
    speedup_interval: tuple[float, float]
    rounds: int
    size_bytes: int
    peak_rss_bytes: int | None = None
    accuracy: float | None = None
    split: str | None = None
    num_images: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "speedup_interval": list(self.speedup_interval)}


def bench(
    subjects: Source | Sequence[Source] | Mapping[str, Source],
    *,
    batch: int | Sequence[int] = 1,
    threads: int | None = None,
    data: Data | str | Path | None = None,
    rounds: int | None = None,
    memory: bool = True,
    progress: Progress | None = None,
) -> list[Figures]:
    """Measure subjects on this machine, all of them interleaved.

    Args:
        subjects: what `cveff.export.subjects.open_subject` opens, one or many, or by name. The first is what
            the others' speedups are relative to.
        batch: batch size, or several. Where a subject is a staged bundle, times are means over the calls of a stream of
            real images, for which `data` is needed.
        threads: of every engine; by default every core this process may use.
        data: labelled images to measure accuracy on (its test split where there is one, else val).
        rounds: interleaved rounds; by default as many as tell the two fastest apart to 2%, within ten seconds.
        memory: measure the peak memory of a fresh process for every file and every staged bundle.

    Returns:
        one `Figures` a subject and batch size, subjects in order within each batch size.

    Raises:
        CveffError: a subject that cannot be opened, no subject, or a setting out of range.
        DataError: data whose classes are not the subject's.
    """
    progress = progress or Silent()
    sizes = (batch,) if isinstance(batch, int) else tuple(batch)
    if not sizes or min(sizes) < 1:
        raise CveffError(f"batch is {batch!r}; give one or more positive integers")
    if rounds is not None and rounds < 1:
        raise CveffError(f"rounds is {rounds!r}; give a positive integer")
    sources = _named(subjects)
    threads = usable_cores() if threads is None else threads
    if data is not None and not isinstance(data, Data):
        from cveff.data.loading import load as load_data

        data = load_data(data, progress=progress)
    with ExitStack() as stack:
        stack.enter_context(pinned_threads(threads))
        opened: dict[str, Subject] = {}
        for given, source in sources:
            subject = open_subject(source, threads=threads, name=given)
            stack.callback(subject.close)
            subject.name = _unique(subject.name, opened)
            opened[subject.name] = subject
        accuracies = {} if data is None else _accuracies(opened, data, progress)
        if any(subject.cascade is not None for subject in opened.values()):
            timings = {size: _time_streams(opened, size, rounds, data) for size in sizes}
        else:
            timings = {
                size: _time(opened, size, rounds)
                for size in progress.track(sizes, "timing in turns", len(sizes))
            }
    peaks = _peaks(opened, sizes[0], progress) if memory else {}
    return _all_figures(opened, sizes, timings, peaks, accuracies, data)


def _all_figures(
    opened: Mapping[str, Subject],
    sizes: Sequence[int],
    timings: Mapping[int, Mapping[str, Latency]],
    peaks: Mapping[str, int],
    accuracies: Mapping[str, float | None],
    data: Data | None,
) -> list[Figures]:
    return [
        _figures(subject, timings[size][name], peaks.get(name), accuracies.get(name), data)
        for size in sizes
        for name, subject in opened.items()
    ]


def _time_streams(
    subjects: Mapping[str, Subject], batch: int, rounds: int | None, data: Data | None
) -> Mapping[str, Latency]:
    """Mean times over real images, for how long a staged bundle takes depends on them.

    Raises:
        CveffError: there are no images.
    """
    if data is None:
        staged = next(name for name, subject in subjects.items() if subject.cascade is not None)
        raise CveffError(
            f"{staged} has stages, so its time depends on the images; give data=… (--data on the command line)"
        )
    count = STREAM_CALLS * batch
    images = {name: first_images(data.evaluation, subject.input, count) for name, subject in subjects.items()}
    streams = {name: Stream(subject.predictor, images[name], batch) for name, subject in subjects.items()}
    return stream_times(streams, seconds=SECONDS, rounds=rounds)


class _OnOwnImages:
    """A predictor with its own batch, so that subjects of different image sizes can be timed in one comparison."""

    def __init__(self, subject: Subject, batch: int) -> None:
        self.threads = subject.threads
        self._predictor = subject.predictor
        self._images = subject.example(batch)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._predictor(self._images)


def _time(subjects: Mapping[str, Subject], batch: int, rounds: int | None) -> Mapping[str, Latency]:
    predictors: dict[str, Predictor] = {
        name: _OnOwnImages(subject, batch) for name, subject in subjects.items()
    }
    stand_in = np.zeros((batch, 1), np.uint8)
    if rounds is None:
        return compare(predictors, stand_in, budget_seconds=SECONDS)
    return compare(predictors, stand_in, min_rounds=rounds, max_rounds=rounds)


def _accuracies(subjects: Mapping[str, Subject], data: Data, progress: Progress) -> dict[str, float | None]:
    split = data.evaluation
    if split.targets is None:
        raise DataError(f"split {split.name!r} of {data.name} has no labels, so accuracy cannot be measured")
    for subject in subjects.values():
        if subject.task != "classification":
            raise DataError(
                f"{subject.name} is a {subject.task} model, whose accuracy is not measured; leave data out"
            )
        if subject.labels and len(subject.labels) != len(data.labels):
            raise DataError(
                f"{subject.name} has {len(subject.labels)} classes but {data.name} has {len(data.labels)}"
            )
    # Subjects that take the same images share one pass over the data.
    specs = list(dict.fromkeys(subject.input for subject in subjects.values()))
    found: dict[str, float | None] = {}
    for spec in specs:
        predictors = {name: subject.predictor for name, subject in subjects.items() if subject.input == spec}
        scores = score(predictors, split, spec, progress, f"measuring accuracy on {split.name}")
        if scores.errors:
            name, why = next(iter(scores.errors.items()))
            raise EngineError(f"{name} {why}")
        found |= {name: scores.accuracy(name) for name in predictors}
    return found


def _peaks(subjects: Mapping[str, Subject], batch: int, progress: Progress) -> dict[str, int]:
    files = {name: subject for name, subject in subjects.items() if subject.path is not None}
    return {
        name: _peak(subject, batch).peak_rss_bytes
        for name, subject in progress.track(files.items(), "memory of fresh processes", len(files))
    }


def _peak(subject: Subject, batch: int) -> Memory:
    images, threads, cascade = subject.example(batch), subject.threads, subject.cascade
    if cascade is not None:
        stages = Stages(cascade.gate, cascade.stages)
        return peak_memory_of_stages(
            cascade.path, stages, subject.input, subject.labels, images, threads=threads
        )
    assert subject.path is not None
    return peak_memory(subject.engine, subject.path, images, threads=threads, options=subject.options)


def _figures(
    subject: Subject, latency: Latency, peak: int | None, accuracy: float | None, data: Data | None
) -> Figures:
    return Figures(
        name=subject.name,
        kind=subject.kind,
        engine=subject.engine,
        precision=subject.precision,
        batch=latency.batch,
        threads=subject.threads,
        median_ms=latency.median_ms,
        p10=latency.p10,
        p90=latency.p90,
        spread=latency.spread,
        throughput=latency.throughput,
        speedup=latency.speedup.median,
        speedup_interval=(latency.speedup.low, latency.speedup.high),
        rounds=len(latency.rounds_ms),
        size_bytes=subject.size_bytes,
        peak_rss_bytes=peak,
        accuracy=accuracy,
        split=None if data is None else data.evaluation.name,
        num_images=None if data is None else len(data.evaluation),
    )


def _named(subjects: Source | Sequence[Source] | Mapping[str, Source]) -> list[tuple[str | None, Source]]:
    """(name or None, source); a single source, and the pair (module, InputSpec), are one subject."""
    if isinstance(subjects, Mapping):
        named: list[tuple[str | None, Source]] = [(str(name), source) for name, source in subjects.items()]
    elif isinstance(subjects, list) or (isinstance(subjects, tuple) and not _is_pair(subjects)):
        named = [(None, source) for source in subjects]
    else:
        named = [(None, subjects)]  # type: ignore[list-item]
    if not named:
        raise CveffError("there is nothing to measure; give at least one subject")
    return named


def _is_pair(value: tuple[Any, ...]) -> bool:
    from torch import nn

    return len(value) == 2 and isinstance(value[0], nn.Module)


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name} #{number}"
    return candidate
