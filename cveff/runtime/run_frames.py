"""What `run.py --calibrate-similar` does: a threshold from one half of a video, and what it does on the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .engine import Engine
from .errors import CveffError
from .frames import Calibration, Comparison, calibrate, compare, thumbnail
from .preprocess import preprocess


@dataclass(frozen=True)
class CalibratedFrames:
    """A threshold and its figures; `str` of it is for people."""

    chosen: Calibration
    measured: Comparison

    def __str__(self) -> str:
        chosen, measured = self.chosen, self.measured
        return (
            f"--skip-similar {chosen.threshold:g}: on {chosen.frames} frames {chosen.skipped:.1%} were skipped and "
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
    if len(frames) < 2:
        raise CveffError("one half of the frames is for choosing and one for measuring; give two or more")

    def fitted(paths: Sequence[Path]) -> Iterator[np.ndarray]:
        return (preprocess(path, engine.spec, resize)[0] for path in paths)

    def best(frame: np.ndarray) -> int:
        return int(engine.probabilities(frame[None])[0].argmax())

    half = (len(frames) + 1) // 2
    small, found = zip(*((thumbnail(frame), best(frame)) for frame in fitted(frames[:half])), strict=True)
    chosen = calibrate(small, found, agreement)
    return CalibratedFrames(chosen, compare(best, fitted(frames[half:]), chosen.threshold))
