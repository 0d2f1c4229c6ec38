"""`Cascade`: stages run in turn, and after each the images that are certain leave; the others go on together.

Survivors are compacted into the next stage's batch, so the saving is proportional at any batch size; a branch inside
one graph would run for the whole batch as long as one image needs it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from .drift import Alarm, DriftMonitor
from .engines import open_file, opens
from .errors import BundleError, CveffError, EngineError
from .gates import certainty
from .input_spec import InputSpec
from .machine import usable_cores
from .manifest import locate
from .reuse import FeatureReuse
from .session import Session
from .stages import Stage, Stages, check_thresholds

_log = logging.getLogger(__name__)

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class StageStatistics:
    """What one stage did since the bundle was opened.

    Attributes:
        name: the stage's.
        images: that left there; `share`: of all.
        calibrated: that share when thresholds were set; nan where they were changed since.
    """

    name: str
    images: int
    share: float
    calibrated: float


class Cascade(Session):
    """Every stage of a bundle, opened, as one session: images in, the logits of the exit each left by.

    Calls from several threads are safe; their images count in the order the calls end.

    Args:
        folder: the bundle.
        stages: what its manifest says of them.
        spec: of the bundle's images.
        labels: their number is checked against every stage's.
        engine: runs every stage instead of the stage's own engine.
        threads: of each engine; None: those it was measured with, but no more than there are.

    Raises:
        EngineError: an engine is not installed, or cannot open its file.
        BundleError: a file does not fit the manifest or the stage before it.
    """

    def __init__(
        self,
        folder: Path,
        stages: Stages,
        spec: InputSpec,
        labels: Sequence[str],
        *,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        stages = stages if engine is None else _on(stages, engine)
        first = stages.stages[0].file
        super().__init__(folder, threads or min(first.threads or usable_cores(), usable_cores()))
        self.engine = first.engine
        self.gate = stages.gate
        self.stages = stages.stages
        self._spec = spec
        self._thresholds = stages.thresholds
        self._lock = threading.Lock()
        self._sessions: list[Session] = []
        try:
            for stage in stages.stages:
                given = threads or min(stage.file.threads or usable_cores(), usable_cores())
                path = locate(folder, stage.file.file)
                self._sessions.append(
                    open_file(stage.file.engine, path, threads=given, options=stage.file.options)
                )
            self._check_fit(len(labels))
        except Exception:
            self.close()
            raise
        takes = [
            set(session.carried) if stage.goes_on else {"images"}
            for stage, session in zip(self.stages, self._sessions, strict=True)
        ]
        self._taken_after = [set().union(*takes[index + 1 :]) for index in range(len(takes))]
        self.num_classes = len(labels)
        self.size, self.channels = spec.size, spec.channels
        self._input_shape = (None, *spec.size, spec.channels)
        self.notes = tuple(note for session in self._sessions for note in session.notes)
        self._start_counting(stages)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Of every stage but the last: images whose certainty (`gates`) reaches it leave there.

        -inf lets every image leave, inf none. Setting them starts the counts again, and without a drift alarm: how many
        images leave is known for the thresholds that were calibrated only.

        Raises:
            CveffError: not one for each stage but the last.
        """
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: Sequence[float]) -> None:
        checked = check_thresholds(values, len(self.stages))
        with self._lock:
            self._thresholds = checked
            calibrated = Stages(self.gate, self.stages)
            self._start_counting(calibrated, is_calibrated=checked == calibrated.thresholds)

    def answer(
        self,
        images: np.ndarray,
        thresholds: Sequence[float] | None = None,
        reuse: FeatureReuse | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits and where each image left.

        Args:
            images: (N, H, W, C) uint8 of the bundle's size; N may be 0.
            thresholds: in place of `thresholds`, for this call, which is then not counted.
            reuse: the images are frames in order, of the video it was made for: those whose features look like those
                of an earlier one take over its answer, and count where that one left.

        Returns:
            logits (N, classes) float32 and the index of the stage (N,) int64.

        Raises:
            CveffError: not one threshold for each stage but the last, or see `check_features`.
            InputSizeError, EngineError: as `__call__`.
        """
        self._check(images)
        if reuse is not None:
            self.check_features()
        is_counted = thresholds is None
        chosen = self._thresholds if thresholds is None else check_thresholds(thresholds, len(self.stages))
        logits, left = self._walk(images, chosen, reuse)
        if is_counted:
            self._count(left)
        return logits, left

    def exits(self, images: np.ndarray) -> list[np.ndarray]:
        """Logits of every exit for every image, (N, classes) float32 each: what thresholds are set from."""
        self._check(images)
        assert self.num_classes is not None
        if not len(images):
            return [np.zeros((0, self.num_classes), np.float32) for _ in self.stages]
        found, carried = [], {"images": images}
        for stage, session in zip(self.stages, self._sessions, strict=True):
            outputs = self._run_stage(stage, session, carried)
            found.append(np.asarray(outputs.pop("logits"), np.float32))
            carried |= outputs
        return found

    def features(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Which images would not leave at the first stage (N,) bool, and what it carries on for each, (N, …) by name.

        Raises:
            CveffError, InputSizeError, EngineError: as `answer` with `reuse`.
        """
        self._check(images)
        self.check_features()
        outputs = self._run_stage(self.stages[0], self._sessions[0], {"images": images})
        stays = self._stay(outputs["logits"], self._thresholds[0])
        return stays, {name: outputs[name] for name in outputs if name in self._taken_after[0]}

    def check_features(self) -> None:
        """
        Raises:
            CveffError: a later stage starts from the images again, so none goes on from what the first has found.
        """
        if not self.stages[1].goes_on:
            raise CveffError(
                f"stage {self.stages[1].name!r} of {self.path} starts from the image again and takes no features of "
                "the stage before it, so there are none to compare; use similar frames instead (--skip-similar)"
            )

    def statistics(self) -> list[StageStatistics]:
        """How many images left at each stage."""
        with self._lock:
            counts, calibrated = self._counts.copy(), self._calibrated
        total, known = int(counts.sum()), sum(calibrated)
        return [
            StageStatistics(
                stage.name, int(count), count / max(1, total), exits / known if known else float("nan")
            )
            for stage, count, exits in zip(self.stages, counts, calibrated, strict=True)
        ]

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """Raised since the bundle was opened, or since `reset`: images no longer leave where they were calibrated
        to."""
        with self._lock:
            return () if self._monitor is None else tuple(self._monitor.alarms)

    def reset(self) -> None:
        """Start the counts and the test again."""
        with self._lock:
            calibrated = Stages(self.gate, self.stages)
            self._start_counting(calibrated, is_calibrated=self._thresholds == calibrated.thresholds)

    def _run(self, images: np.ndarray) -> np.ndarray:
        logits, left = self._walk(images, self._thresholds)
        self._count(left)
        return logits

    def _release(self) -> None:
        for session in self._sessions:
            session.close()

    def _walk(
        self, images: np.ndarray, thresholds: Sequence[float], reuse: FeatureReuse | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self.num_classes is not None
        logits = np.empty((len(images), self.num_classes), np.float32)
        left = np.zeros(len(images), np.int64)
        here = np.arange(len(images))  # images that are still on their way
        whose = np.arange(len(images))  # the image whose answer each takes; -1: of the call before
        carried = {"images": images}
        for index, (stage, session) in enumerate(zip(self.stages, self._sessions, strict=True)):
            if not len(here):
                break
            outputs = self._run_stage(stage, session, carried)
            found = outputs.pop("logits")
            left[here] = index
            logits[here] = found
            if index == len(thresholds):
                break
            carried = {
                name: values
                for name, values in {**carried, **outputs}.items()
                if name in self._taken_after[index]
            }
            stays = self._stay(found, thresholds[index])
            if reuse is not None and index == 0:
                sources = reuse.sources({name: carried[name][stays] for name in outputs if name in carried})
                whose[here[stays]] = np.where(sources < 0, -1, here[stays][sources])
                stays = stays & (whose == here)
            if not stays.all():
                here = here[stays]
                carried = {name: values[stays] for name, values in carried.items()}
            if reuse is not None and index == 0:
                went_on = here
        if reuse is not None and len(images):
            reuse.take_over(logits, left, whose)
            if len(went_on):
                reuse.remember(logits[went_on[-1]], int(left[went_on[-1]]))
        return logits, left

    def _stay(self, logits: np.ndarray, threshold: float) -> np.ndarray:
        """Images that go on, (N,) bool. A certainty that is no number reaches no threshold; -inf is none that anything
        must reach."""
        return ~(certainty(logits, self.gate) >= threshold) & (threshold != -np.inf)

    def _run_stage(
        self, stage: Stage, session: Session, carried: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        if stage.goes_on:
            return in_batches({name: carried[name] for name in session.carried}, session.go_on, stage.batches)
        images = resized(carried["images"], stage.size, stage.interpolation)
        return in_batches({"images": images}, lambda part: session.outputs(part["images"]), stage.batches)

    def _count(self, left: np.ndarray) -> None:
        with self._lock:
            self._counts += np.bincount(left, minlength=len(self.stages))
            had_alarm = self._monitor is not None and bool(self._monitor.alarms)
            raised = [] if self._monitor is None else self._monitor.update(left)
        if raised and not had_alarm:  # one line a stream; `alarms` has them all
            _log.warning("%s: %s", self.path, raised[0])

    def _start_counting(self, stages: Stages, is_calibrated: bool = True) -> None:
        exits = [stage.exits if is_calibrated else 0 for stage in stages.stages]
        self._counts = np.zeros(len(exits), np.int64)
        self._calibrated = exits
        self._monitor = DriftMonitor(exits) if sum(exits) else None

    def _check_fit(self, num_classes: int) -> None:
        names: set[str] = set()
        for stage, session in zip(self.stages, self._sessions, strict=True):
            if session.num_classes not in (None, num_classes):
                raise BundleError(
                    f"{session.path} has {session.num_classes} classes, but the manifest has {num_classes} labels; the "
                    "bundle's parts do not belong together"
                )
            if stage.goes_on != bool(session.carried):
                takes = "what another stage carries" if session.carried else "images"
                raise BundleError(f"{session.path} takes {takes}, the manifest says otherwise; it is damaged")
            missing = set(session.carried) - names
            if missing:
                raise BundleError(
                    f"{session.path} takes {', '.join(sorted(missing))}, which no stage before it gives; the bundle's "
                    "parts do not belong together"
                )
            if not stage.goes_on and (
                session.size not in (None, stage.size) or session.channels not in (None, self._spec.channels)
            ):
                raise BundleError(
                    f"{session.path} takes images {session.size} with {session.channels} channels, but "
                    f"the manifest says "
                    f"{stage.size} with {self._spec.channels}; the bundle's parts do not belong together"
                )
            names |= set(session.output_names)


def resized(images: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """A batch (N, H, W, C) uint8 made smaller (or larger) with Pillow's filter; itself where it has the size."""
    if images.shape[1:3] == size:
        return images
    found = np.empty((len(images), *size, images.shape[3]), np.uint8)
    for index, pixels in enumerate(images):
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        smaller = picture.resize((size[1], size[0]), Image.Resampling[interpolation.upper()])
        found[index] = np.asarray(smaller).reshape(found.shape[1:])
    return found


def in_batches(values: Mapping[str, np.ndarray], run: Run, batches: Sequence[int]) -> dict[str, np.ndarray]:
    """`run` on parts whose sizes are all among `batches`: the largest as often as it goes, the rest filled up.

    Args:
        values: arrays (N, …), N 1 or more.
        batches: ascending; empty: all at once.
    """
    count = len(next(iter(values.values())))
    if not batches or count in batches:
        return run(values)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, count, batches[-1]):
        part = {name: array[start : start + batches[-1]] for name, array in values.items()}
        size = len(next(iter(part.values())))
        whole = next(batch for batch in batches if batch >= size)
        if whole > size:  # with copies of an image: it is one the network knows how to handle
            part = {
                name: np.concatenate([array, np.repeat(array[-1:], whole - size, axis=0)])
                for name, array in part.items()
            }
        parts.append({name: array[:size] for name, array in run(part).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _on(stages: Stages, engine: str) -> Stages:
    """The same files on another engine.

    Raises:
        EngineError: it does not open one of them.
    """
    name, _, precision = engine.partition(":")
    for stage in stages.stages:
        if not opens(name, stage.file.file) or precision not in ("", stage.file.precision):
            raise EngineError(
                f"stage {stage.name!r} is {stage.file.file} ({stage.file.precision or stage.file.engine}), "
                "which is not "
                f"for engine {engine!r}; leave the engine out"
            )
    return replace(
        stages,
        stages=tuple(
            stage
            if stage.file.engine == name
            else replace(stage, file=replace(stage.file, engine=name, options={}))
            for stage in stages.stages
        ),
    )
