"""`Engine`: an open bundle. Images in, probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import manifest as bundle
from .engines import open_file
from .errors import BundleError, EngineError
from .input_spec import InputSpec
from .machine import usable_cores
from .preprocess import Source, preprocess
from .session import Session


class Engine:
    """A bundle opened with one of the engines it ships files for.

    Calls are safe from several threads; they run one after another on OpenVINO.

    Attributes:
        spec: what the model takes.
        labels: one name a class, in the order of the columns of the result.
        manifest: the whole manifest, checked; `file` is its entry that runs.
        name: the engine in use, one of `engines.ENGINES`.
        precision: "fp32", "bf16" or one of int8's kinds; "" where the manifest does not say.
        threads: threads the engine uses.
        path: the bundle's folder.
    """

    def __init__(
        self, session: Session, manifest: dict[str, Any], path: Path, file: bundle.ModelFile
    ) -> None:
        self.manifest = manifest
        self.file = file
        self.spec = InputSpec.from_json(manifest["input"])
        self.labels: tuple[str, ...] = tuple(manifest["labels"])
        self.name = session.engine
        self.precision = file.precision
        self.threads = session.threads
        self.path = path
        self._session = session
        self._check_model_fits()

    @classmethod
    def open(
        cls, path: str | Path, engine: str | None = None, threads: int | None = None, verify: bool = True
    ) -> Engine:
        """Open a bundle; see `cveff.runtime.open`."""
        folder = Path(path)
        manifest = bundle.read_manifest(folder)
        chosen = _choose(manifest, engine)
        bundle.verify_files(folder, manifest, hashes=verify)
        if threads is None:
            threads = min(chosen.threads or usable_cores(), usable_cores())
        elif threads < 1:
            raise EngineError(
                f"threads is {threads!r}; give a positive integer, or None for the bundle's own choice"
            )
        session = open_file(
            chosen.engine, bundle.locate(folder, chosen.file), threads=threads, options=chosen.options
        )
        return cls(session, manifest, folder, chosen)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities (softmax of the logits).

        Args:
            images: (N, H, W, C) uint8 of `spec.size`, such as `preprocess` returns; N may be 0.

        Returns:
            (N, classes) float32; every row sums to 1.

        Raises:
            InputSizeError: another shape or dtype.
            EngineError: the engine failed or computed values that are not finite.
        """
        logits = self.logits(images)
        if not np.isfinite(logits).all():
            raise EngineError(
                f"{self.name} computed logits that are not finite from {self._session.path.name}; "
                "try another engine or precision"
            )
        return softmax(logits)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, classes) float32 of a batch; arguments and errors as `__call__`."""
        return self._session(images)

    def preprocess(self, sources: Sequence[Source] | Source, resize: bool = False) -> np.ndarray:
        """Decode, resize and crop images of any size into the batch the model takes.

        Args:
            sources: paths, the bytes of files, Pillow images or RGB arrays; one or many.
            resize: enlarge images that are smaller than the model's input instead of refusing them.

        Returns:
            (N, H, W, C) uint8, equal bit for bit to what the model was scored on.

        Raises:
            ImageError, InputSizeError: names the image.
        """
        return preprocess(sources, self.spec, resize)

    def close(self) -> None:
        """Free the engine's memory; the object cannot predict afterwards."""
        self._session.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        what = f"{self.name} {self.precision}".strip()
        return f"<Engine {what} of {self.path}, {self.threads} threads, {len(self.labels)} classes>"

    def _check_model_fits(self) -> None:
        """The model's own shapes against the manifest's: a swapped file is caught before it predicts."""
        session, spec = self._session, self.spec
        if session.size not in (None, spec.size) or session.channels not in (None, spec.channels):
            raise BundleError(
                f"{session.path} takes images {session.size} with {session.channels} channels, but the "
                f"manifest says {spec.size} with {spec.channels}; the bundle's parts do not belong together"
            )
        if session.num_classes not in (None, len(self.labels)):
            raise BundleError(
                f"{session.path} has {session.num_classes} classes, but the manifest has {len(self.labels)} "
                "labels; the bundle's parts do not belong together"
            )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float32, stable for logits of any size."""
    with np.errstate(over="ignore", under="ignore"):  # a difference of -inf is right: its exponential is 0
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float32)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _choose(manifest: dict[str, Any], wanted: str | None) -> bundle.ModelFile:
    """The model file to run: the bundle's choice, or the first of the engine (and precision) asked for.

    TensorRT builds from any ONNX file; of several that of floats, as int8 for CPUs is rounded in ways it refuses.
    """
    files = bundle.model_files(manifest)
    if wanted is None:
        return files[0]
    name, _, precision = wanted.partition(":")
    for file in files:
        if file.engine == name and precision in ("", file.precision):
            return file
    if name == "tensorrt":
        for file in files:
            if file.file.endswith(".onnx") and file.precision in ("", precision or "fp32"):
                return replace(file, engine=name, options={})
    shipped = ", ".join(
        f"{file.engine}:{file.precision}" if file.precision else file.engine for file in files
    )
    raise EngineError(f"this bundle ships no file for engine {wanted!r}; it has {shipped}")
