"""Peak resident memory, and the time to a first answer, of a fresh process that opens files and predicts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import cveff
from cveff.errors import EngineError
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.stages import Stages

CHILD = "cveff.measure._memory_child"


@dataclass(frozen=True)
class Memory:
    """What the fresh process measured of itself.

    Attributes:
        peak_rss_bytes: the most memory it ever held resident: interpreter, numpy, engine, weights,
            activations.
        baseline_rss_bytes: resident before the engine was imported.
        open_seconds: importing the engine and opening the file.
        first_prediction_seconds: the first call, on `batch` images.
        num_predictions: calls made in all.
        modules: top-level modules it had imported at the end.
    """

    peak_rss_bytes: int
    baseline_rss_bytes: int
    open_seconds: float
    first_prediction_seconds: float
    batch: int
    threads: int
    num_predictions: int
    modules: tuple[str, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the list of modules."""
        return {key: value for key, value in vars(self).items() if key != "modules"}


def peak_memory(
    engine: str,
    path: str | Path,
    images: np.ndarray,
    *,
    threads: int,
    options: Mapping[str, Any] | None = None,
    num_predictions: int = 3,
    timeout_seconds: float = 120.0,
) -> Memory:
    """Open `path` with `engine` in a new process without torch, predict `images`, and report its memory.

    Args:
        engine, path, threads, options: as `cveff.runtime.engines.open_file`.
        images: uint8 (N, H, W, C), the batch that is predicted every time.
        num_predictions: engines still grow their arenas in the second call.

    Raises:
        EngineError: the process failed (the last line it wrote to stderr is quoted) or took too long.
    """
    request = {
        "engine": engine,
        "path": str(Path(path).absolute()),
        "threads": threads,
        "options": dict(options or {}),
        "num_predictions": num_predictions,
    }
    return _measured(request, images, timeout_seconds, what=f"{engine} on {path}")


def peak_memory_of_stages(
    folder: str | Path,
    stages: Stages,
    spec: InputSpec,
    labels: Sequence[str],
    images: np.ndarray,
    *,
    threads: int,
    num_predictions: int = 3,
    timeout_seconds: float = 120.0,
) -> Memory:
    """The same of a staged bundle's files, all of them open, with every image going through to the last.

    Args:
        folder: holds the files; stages, spec, labels: as of `cveff.runtime.cascade.Cascade`.
        images: uint8 (N, H, W, C) of `spec`'s size.

    Raises:
        EngineError: as `peak_memory`.
    """
    request = {
        "folder": str(Path(folder).absolute()),
        "stages": stages.to_json(),
        "input": spec.to_json(),
        "labels": list(labels),
        "threads": threads,
        "num_predictions": num_predictions,
    }
    return _measured(request, images, timeout_seconds, what=f"{len(stages.stages)} stages of {folder}")


def _measured(request: dict[str, Any], images: np.ndarray, timeout_seconds: float, what: str) -> Memory:
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", images, allow_pickle=False)
        request = {**request, "images": str(Path(folder) / "images.npy")}
        answer = _run_child(json.dumps(request), timeout_seconds, what)
    return Memory(**{**answer, "modules": tuple(answer["modules"])})


def _run_child(request: str, timeout_seconds: float, what: str) -> dict[str, Any]:
    # The package may be run from a checkout: the child must find the same one whatever its folder.
    root = str(Path(cveff.__file__).parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    try:
        with _no_handler_of_ended_children():
            done = subprocess.run(
                [sys.executable, "-m", CHILD],
                input=request,
                capture_output=True,
                text=True,
                timeout=timeout_seconds,
                check=False,
                env={**os.environ, "PYTHONPATH": path},
            )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"{what}: a fresh process took longer than {timeout_seconds:g} s to open the file and predict; "
            "raise timeout_seconds or use a smaller batch"
        ) from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"no message, exit status {done.returncode}"
        reason = re.sub(r"^cveff[\w.]*Error: ", "", reason)  # our own messages stand without the class
        if done.returncode < 0:
            reason = f"killed by signal {-done.returncode} (9: the system ran out of memory); {reason}"
        raise EngineError(f"{what}: a fresh process could not open the file and predict: {reason}")
    # Engines may chat on stdout; the answer is the last line.
    try:
        answer: dict[str, Any] = json.loads((done.stdout.splitlines() or [""])[-1])
    except json.JSONDecodeError:
        raise EngineError(f"{what}: a fresh process ended well but gave no answer") from None
    return answer


@contextmanager
def _no_handler_of_ended_children() -> Iterator[None]:
    """SIGCHLD at its default for the time of the block.

    A `DataLoader` of the caller's leaves torch's handler behind. Once OpenVINO is loaded, a process can crash when that
    handler runs as a child ends. Handlers can be changed in the main thread alone; in another one nothing is done.
    """
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    is_main = threading.current_thread() is threading.main_thread()
    # None: installed by other than Python, which Python cannot put back.
    earlier = signal.getsignal(number) if number is not None and is_main else None
    if number is None or earlier is None:
        yield
        return
    signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, earlier)
