"""`Engine`: an open bundle, or an exported file. Images in, probabilities, detections or masks out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import manifest as bundle
from .cascade import Cascade
from .detections import Detections, Suppression, suppress, unpad
from .engines import open_file
from .errors import BundleError, EngineError
from .exported import file_manifest
from .input_spec import InputSpec
from .machine import usable_cores
from .preprocess import Source, preprocess
from .reuse import FeatureReuse
from .session import Session
from .stages import read_stages

Answer = np.ndarray | dict[str, list[np.ndarray]]
"""Probabilities of a classifier; of other tasks, one entry an image under each name."""


class Engine:
    """A bundle opened with one of the engines it ships files for, or an exported file.

    Calls are safe from several threads; they run one after another on OpenVINO.

    Attributes:
        spec: what the model takes.
        task: "classification", "detection" or "segmentation".
        labels: one name a class, in the order of the columns of the result.
        manifest: the whole manifest, checked, or of an exported file what it says about itself; `file` is the entry
            that runs.
        name: the engine in use, one of `engines.ENGINES`.
        precision: "fp32", "bf16" or one of int8's kinds; "" where the manifest does not say.
        threads: threads the engine uses.
        path: the bundle's folder, or the file.
    """

    def __init__(
        self, session: Session, manifest: dict[str, Any], path: Path, file: bundle.ModelFile
    ) -> None:
        self.manifest = manifest
        self.file = file
        self.spec = InputSpec.from_json(manifest["input"])
        self.task: str = manifest["task"]
        self.labels: tuple[str, ...] = tuple(manifest["labels"])
        self._suppression = (
            Suppression.from_json(manifest["suppression"]) if self.task == "detection" else None
        )
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
        if folder.suffix == ".onnx" and folder.is_file():
            return cls._open_exported(folder, engine, threads)
        manifest = bundle.read_manifest(folder)
        stages = read_stages(manifest, str(folder / bundle.FILE_NAME))
        chosen = _choose(manifest, engine) if stages is None else bundle.model_files(manifest)[0]
        bundle.verify_files(folder, manifest, hashes=verify)
        if threads is not None and threads < 1:
            raise EngineError(
                f"threads is {threads!r}; give a positive integer, or None for the bundle's own choice"
            )
        if stages is not None:
            spec, labels = InputSpec.from_json(manifest["input"]), manifest["labels"]
            cascade = Cascade(folder, stages, spec, labels, engine=engine, threads=threads)
            return cls(cascade, manifest, folder, chosen)
        if threads is None:
            threads = min(chosen.threads or usable_cores(), usable_cores())
        session = open_file(
            chosen.engine, bundle.locate(folder, chosen.file), threads=threads, options=chosen.options
        )
        return cls(session, manifest, folder, chosen)

    @classmethod
    def _open_exported(cls, path: Path, engine: str | None, threads: int | None) -> Engine:
        if engine not in (None, "onnxruntime"):
            raise EngineError(
                f"{path} is an exported file, which opens with onnxruntime, not {engine!r}; engines are a bundle's"
            )
        session = open_file("onnxruntime", path, threads=usable_cores() if threads is None else threads)
        manifest = file_manifest(path, session.metadata())
        return cls(session, manifest, path, bundle.model_files(manifest, str(path))[0])

    def __call__(self, images: np.ndarray) -> Answer:
        """Class probabilities (softmax of the logits); a dict for other tasks.

        Args:
            images: (N, H, W, C) uint8 of `spec.size`, such as `preprocess` returns; N may be 0.

        Returns:
            (N, classes) float32; every row sums to 1. Of a detector `{"boxes", "scores", "labels"}`, each a list with
            an entry an image, as `detect` returns them. Of a segmentation network `{"masks"}`, as `segment` does.

        Raises:
            InputSizeError: another shape or dtype.
            EngineError: the engine failed or computed values that are not finite.
        """
        if self.task == "detection":
            found = self.detect(images)
            return {key: [image[key] for image in found] for key in ("boxes", "scores", "labels")}
        if self.task == "segmentation":
            return {"masks": list(self.segment(images))}
        return self.probabilities(images)

    @property
    def cascade(self) -> Cascade | None:
        """The stages of a staged bundle, with their thresholds, counts and drift alarm; None of other bundles."""
        return self._session if isinstance(self._session, Cascade) else None

    def staged(self, images: np.ndarray, reuse: FeatureReuse | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Of a staged bundle: probabilities (N, classes) float32, and the index of the stage (N,) each image left at.

        Args:
            reuse: as of `Cascade.answer`.

        Raises:
            EngineError: the bundle has no stages, or as `__call__`.
        """
        if self.cascade is None:
            raise EngineError(f"{self.path} has no stages; `probabilities` answers")
        logits, left = self.cascade.answer(images, reuse=reuse)
        return softmax(self._finite(logits)), left

    def detect(self, images: np.ndarray) -> list[Detections]:
        """Detections of each image, most certain first.

        Suppression is done here where the file leaves it out, by the same rule.

        Returns:
            a dict an image: `boxes` (D, 4) float32, left, top, right, bottom in pixels of the model's image (see
            `cveff.runtime.placement`); `scores` (D,) float32; `labels` (D,) int64, indices into `labels`.

        Raises:
            EngineError: the model is of another task, or as `__call__`.
        """
        if self._suppression is None:
            raise EngineError(f"{self.path} is a {self.task} model; only detection models detect")
        outputs = self._outputs(images, ("boxes", "scores"))
        boxes, scores = outputs["boxes"], outputs["scores"]
        if "labels" in outputs:
            if outputs["labels"].max(initial=0) >= len(self.labels):
                raise self._other_classes(int(outputs["labels"].max()) + 1)
            return [unpad(*row) for row in zip(boxes, scores, outputs["labels"], strict=True)]
        if scores.shape[-1] != len(self.labels):
            raise self._other_classes(scores.shape[-1])
        return [suppress(*row, self._suppression) for row in zip(boxes, scores, strict=True)]

    def segment(self, images: np.ndarray) -> np.ndarray:
        """The most probable class of each pixel, an index into `labels`: (N, H, W) uint8.

        Raises:
            EngineError: the model is of another task, or as `__call__`.
        """
        if self.task != "segmentation":
            raise EngineError(f"{self.path} is a {self.task} model; only segmentation models segment")
        outputs = self._outputs(images)
        if "labels" in outputs:
            return outputs["labels"]
        logits = outputs["logits"]
        if logits.shape[1] != len(self.labels):
            raise self._other_classes(logits.shape[1])
        return logits.argmax(1).astype(np.uint8)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Of a classifier: (N, classes) float32; arguments and errors as `__call__`."""
        return softmax(self._finite(self.logits(images)))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Of a classifier: logits (N, classes) float32 of a batch; arguments and errors as `__call__`."""
        if self.task != "classification":
            raise EngineError(
                f"{self.path} is a {self.task} model, which has no class probabilities; call it"
            )
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
        what += "" if self.cascade is None else f", {len(self.cascade.stages)} stages,"
        return f"<Engine {what} of {self.path}, {self.threads} threads, {len(self.labels)} classes>"

    def _finite(self, logits: np.ndarray) -> np.ndarray:
        if not np.isfinite(logits).all():
            raise EngineError(
                f"{self.name} computed logits that are not finite from {self._session.path.name}; "
                "try another engine or precision"
            )
        return logits

    def _outputs(self, images: np.ndarray, finite: Sequence[str] = ("logits",)) -> dict[str, np.ndarray]:
        outputs = self._session.outputs(images)
        for name in finite:
            if name in outputs and not np.isfinite(outputs[name]).all():
                raise EngineError(
                    f"{self.name} computed {name} that are not finite from {self._session.path.name}; try another "
                    "engine or precision"
                )
        return outputs

    def _other_classes(self, found: int) -> BundleError:
        return BundleError(
            f"{self._session.path} has {found} classes or more, but there are {len(self.labels)} labels; the parts do "
            "not belong together"
        )

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
