"""`EngineTimer`: how long models take on a target's engine, exported, opened and timed in turns."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from cveff.compress.quant.post_training import Quantized
from cveff.edits import edit_to_json
from cveff.errors import CveffError, ExportError, TargetError
from cveff.export.float_parts import FloatParts
from cveff.export.onnx import example_images, export
from cveff.measure.latency import Clock, Latency, compare
from cveff.measure.threads import pinned_threads
from cveff.model import Model
from cveff.runtime.engines import ENGINES, open_file
from cveff.runtime.session import Session
from cveff.target import Target

SECONDS = 6.0
"""Time for the rounds of one comparison, past the fewest that `compare` needs."""


class EngineTimer:
    """Times models as float32 ONNX files on one engine; implements `cveff.steps.ModelTimer`.

    A file is kept, in a temporary folder, for as long as the timer is: a model of the same structure is not exported
    again, whatever its weights (no CPU kernel's time depends on them). Close it, or use it in a `with` block.

    Attributes:
        engine: "onnxruntime" or "openvino".
        threads: of the engine; the process is kept to as many cores while it measures.
        batch: images a call.
    """

    def __init__(
        self,
        target: Target,
        engine: str | None = None,
        seconds: float = SECONDS,
        clock: Clock = time.perf_counter,
    ) -> None:
        """
        Args:
            target: gives threads, the batch size (its first) and, through its first fp32 candidate, the engine.
            engine: another engine.
            seconds: time for the rounds of one comparison.
            clock: seconds, as for `compare`.

        Raises:
            TargetError: the engine is unknown, or the target has no fp32 candidate and no engine is given.
        """
        if engine is not None and engine not in ENGINES:
            raise TargetError(f"engine {engine!r} is unknown; known: {', '.join(ENGINES)}")
        if engine is None:  # a target may name engines of other machines: opening a file says so
            engine = next((name for name, precision in target.candidates if precision == "fp32"), None)
        if engine is None:
            raise TargetError(
                f"target {target.name!r} has no fp32 candidate to time models on; add one, or give an engine"
            )
        self.engine, self.threads, self.batch = engine, target.num_threads, target.batch_sizes[0]
        self._seconds, self._clock = seconds, clock
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[str, Path] = {}
        self._is_closed = False

    def use(self, model: Model, path: Path) -> None:
        """Time the file `path`, which `model` was exported to before, instead of exporting it again."""
        self._files[structure(model)] = path

    def use_parts(self, model: Model, found: Quantized, parts: Sequence[Quantized]) -> None:
        """Time files that are cut from one export of `found`, which is `model` rounded throughout, for `parts` of it.

        Raises:
            ExportError: the network cannot be exported.
        """
        folder = self._in_folder()
        files = FloatParts(model, found, [part.placement for part in parts])
        for part in parts:
            key = structure(part.of(model))
            self._files[key] = files.write(part.placement, folder / f"{key}.onnx")

    def milliseconds(self, models: Mapping[str, Model]) -> dict[str, float]:
        """Median milliseconds of a call at `batch` images, all models timed in turns.

        Args:
            models: by name; left as they are.

        Raises:
            CveffError: there is no model, or the timer was closed.
            ExportError: a model cannot be exported, or its file answers in another shape than the model.
            EngineError: the engine cannot open or run a file.
        """
        return {name: latency.median_ms for name, latency in self.compare(models).items()}

    def compare(self, models: Mapping[str, Model]) -> Mapping[str, Latency]:
        """The same with spreads and paired ratios; speedups are relative to the first model."""
        if self._is_closed:
            raise CveffError("this timer was closed; make another")
        files = {name: self._exported(model) for name, model in models.items()}
        options = {"inference_precision": "f32"} if self.engine == "openvino" else {}
        with ExitStack() as stack:
            # Before the files are opened: engines make their threads then.
            stack.enter_context(pinned_threads(self.threads))
            calls = {}
            for name, model in models.items():
                session = stack.enter_context(
                    open_file(self.engine, files[name], threads=self.threads, options=options)
                )
                calls[name] = _OnOwnImages(session, example_images(self.batch, model))
                _check_shape(calls[name](), model, self.batch)
            stand_in = np.zeros((self.batch, 1), np.uint8)
            return compare(calls, stand_in, budget_seconds=self._seconds, clock=self._clock)

    def close(self) -> None:
        """Remove the exported files; closing twice is harmless."""
        self._is_closed = True
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> EngineTimer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _exported(self, model: Model) -> Path:
        key = structure(model)
        if key not in self._files:
            # Answers are compared with PyTorch's when the model is shipped; here only its time counts.
            self._files[key] = export(model, self._in_folder() / f"{key}.onnx", check=False)
        return self._files[key]

    def _in_folder(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="cveff-timer-")
        return Path(self._folder.name)


class _OnOwnImages:
    """A session with its own batch, so that models of different image sizes are timed in one comparison."""

    def __init__(self, session: Session, images: np.ndarray) -> None:
        self.threads = session.threads
        self._session, self._images = session, images

    def __call__(self, images: np.ndarray | None = None) -> np.ndarray:
        return self._session(self._images)


def structure(model: Model) -> str:
    """A digest of everything about a model but its weights: two of the same digest export to graphs that differ in
    constants alone."""
    spec = model.spec
    described = {
        "architecture": spec.architecture,
        "arguments": dict(spec.arguments),
        "input": spec.input.to_json(),
        "edits": [edit_to_json(edit) for edit in spec.edits],
        "modules": repr(model.module),
        "shapes": [(name, list(value.shape)) for name, value in model.module.state_dict().items()],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _check_shape(logits: np.ndarray, model: Model, batch: int) -> None:
    """A file whose batch size or classes were lost on the way would be timed as if it were the model."""
    classes = len(model.spec.labels) or logits.shape[-1]
    if logits.shape != (batch, classes):
        raise ExportError(
            f"{model.spec.architecture}: the exported file answers in shape {logits.shape} for {batch} images of "
            f"{classes} classes; export it with cveff.export, whose check says more"
        )
