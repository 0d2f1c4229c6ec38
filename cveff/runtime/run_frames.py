"""What `run.py --calibrate-similar` and `--calibrate-features` do: a threshold from one half of a video, and figures
from the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .cascade import Cascade
from .engine import Engine
from .errors import CveffError
from .frames import Calibration, Comparison, calibrate, compare, in_turns, thumbnail
from .preprocess import preprocess
from .reuse import FeatureReuse, difference, signatures


@dataclass(frozen=True)
class CalibratedFrames:
    """A threshold and its figures; `str` of it is for people.

    Attributes:
        option: of `run.py`, which takes the threshold.
    """

    chosen: Calibration
    measured: Comparison
    option: str = "--skip-similar"

    def __str__(self) -> str:
        chosen, measured = self.chosen, self.measured
        return (
            f"{self.option} {chosen.threshold:g}: on {chosen.frames} frames {chosen.skipped:.1%} were skipped and "
            f"{chosen.agreement:.1%} of answers stayed the same; on the {measured.frames} frames behind them "
            f"{measured.skipped:.1%} and {measured.agreement:.1%}, at {measured.skipping_ms:.2f} ms a frame instead of "
            f"{measured.every_ms:.2f} ms"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"chosen": asdict(self.chosen), "measured": asdict(self.measured)}


def check_frames(engine: Engine) -> None:
    """
    Raises:
        CveffError: the model says where things are, which an earlier frame does not know.
    """
    if engine.task != "classification":
        raise CveffError(
            f"frames are skipped for classifiers; {engine.path} is a {engine.task} model, whose boxes or masks "
            "move with the image: leave --skip-similar and --calibrate-similar out"
        )


def calibrate_frames(
    engine: Engine, frames: Sequence[Path], agreement: float, *, resize: bool = False
) -> CalibratedFrames:
    """Choose a threshold on the first half of `frames`, and measure it on the rest, one frame a call.

    Args:
        engine: of a classifier.
        frames: image files, in order.
        agreement: least share of frames (0..1) whose best class stays the same.

    Raises:
        CveffError: fewer than two frames, or as `calibrate`.
        ImageError, InputSizeError: a frame cannot be read.
    """
    first, second = _halves(engine, frames, resize)

    def best(frame: np.ndarray) -> int:
        return int(engine.probabilities(frame[None])[0].argmax())

    small, found = zip(*((thumbnail(frame), best(frame)) for frame in first), strict=True)
    chosen = calibrate(small, found, agreement)
    return CalibratedFrames(chosen, compare(best, second, chosen.threshold))


def check_features(engine: Engine) -> Cascade:
    """The bundle's stages, of which a later one goes on from what the first has found.

    Raises:
        CveffError: there are none, or see `Cascade.check_features`.
    """
    if engine.cascade is None:
        raise CveffError(
            f"{engine.path} has no stages, so there are no features between them; leave --reuse-features and "
            "--calibrate-features out, or train the network with exits (early_exit)"
        )
    engine.cascade.check_features()
    return engine.cascade


def calibrate_features(
    engine: Engine, frames: Sequence[Path], agreement: float, *, resize: bool = False
) -> CalibratedFrames:
    """The same for `FeatureReuse`: arguments as of `calibrate_frames`, the bundle as `check_features` wants it.

    Raises:
        CveffError: as `calibrate_frames`; or every frame of the first half leaves at the first stage, and nothing is
            left to save.
    """
    cascade = check_features(engine)
    first, second = _halves(engine, frames, resize)

    def best(frame: np.ndarray, reuse: FeatureReuse | None = None) -> int:
        return int(cascade.answer(frame[None], reuse=reuse)[0][0].argmax())

    seen, small, found = 0, [], []
    for frame in first:
        seen += 1
        stays, carried = cascade.features(frame[None])
        if stays[0]:
            small.append(signatures(carried)[0])
            found.append(best(frame))
    if not small:
        raise CveffError(
            f"all {seen} frames of the first half leave at stage {cascade.stages[0].name!r}; there is nothing to save"
        )
    # The others answer for themselves.
    needed = max(0.0, 1 - (1 - agreement) * seen / len(small))
    chosen = calibrate(small, found, needed, difference)
    share = len(small) / seen
    chosen = replace(
        chosen,
        frames=seen,
        skipped=share * chosen.skipped,
        agreement=1 - share * (1 - chosen.agreement),
    )
    reuse = FeatureReuse(chosen.threshold)
    measured = in_turns(best, lambda frame: best(frame, reuse), second)
    measured = replace(measured, skipped=reuse.share_reused)
    return CalibratedFrames(chosen, measured, "--reuse-features")


def _halves(
    engine: Engine, frames: Sequence[Path], resize: bool
) -> tuple[Iterator[np.ndarray], Iterator[np.ndarray]]:
    """Frames to choose by and frames to measure on, as the model takes them."""
    if len(frames) < 2:
        raise CveffError("one half of the frames is for choosing and one for measuring; give two or more")
    half = (len(frames) + 1) // 2
    first, second = (
        (preprocess(path, engine.spec, resize)[0] for path in paths)
        for paths in (frames[:half], frames[half:])
    )
    return first, second
