"""`verify`: does this file do what is claimed of it? Hashes, accuracy, agreement, and where layers part."""

from __future__ import annotations

import math
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cveff.data.dataset import Data
from cveff.errors import BundleError, CveffError, DataError
from cveff.export.build_candidates import ONNX
from cveff.export.onnx import export
from cveff.export.scoring import Scores, first_images, score
from cveff.export.subjects import Source, Subject, open_subject
from cveff.export.task_predictor import unpacked
from cveff.export.verify_stages import check_stages
from cveff.measure.detections import agreement
from cveff.measure.onnx_parity import layer_parity
from cveff.measure.openvino_parity import openvino_layer_parity
from cveff.measure.parity import LayerParity, first_large_difference, largest_rise, relative_difference
from cveff.measure.torch_parity import module_parity
from cveff.model import Model
from cveff.progress import Progress, Silent
from cveff.runtime.aot_session import read_package
from cveff.runtime.processor import processor_notes

FLOAT_TOLERANCE = 1e-3
"""Relative difference of logits past which a float32 file computes something else than its original."""
LAYER_IMAGES, RANDOM_IMAGES = 16, 32
TASK_IMAGES = 4
"""Random images for detectors and segmentation networks, which are larger."""
MIN_TASK_AGREEMENT = 0.99
"""Share of detections or pixels under which a float32 file answers otherwise than its original."""


@dataclass(frozen=True)
class Verification:
    """What was checked and found.

    Attributes:
        subject, reference: names; `reference` is None where there was nothing to compare with.
        problems: what is wrong, in words; empty when all is well. `notes`: what a reader should know.
        accuracy, reference_accuracy: top-1 shares (0..1) on `num_images` images of `split`; None without data.
        claimed_accuracy: the bundle's manifest's, where it was measured on as many images of the same split.
        agreement: share of the images with the reference's top-1.
        max_relative_difference: of the logits against the reference's, over the same images (random pixels
            without data).
        layers: against the reference, in execution order; empty where layers cannot be compared.
        first_large_difference: the first layer past the tolerance; `largest_rise`: where most error is made.
    """

    subject: str
    kind: str
    engine: str
    precision: str
    reference: str | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    accuracy: float | None = None
    reference_accuracy: float | None = None
    claimed_accuracy: float | None = None
    agreement: float | None = None
    max_relative_difference: float | None = None
    split: str | None = None
    num_images: int | None = None
    layers: tuple[LayerParity, ...] = ()
    first_large_difference: LayerParity | None = None
    largest_rise: LayerParity | None = None

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, `ok` among them."""
        values = {**vars(self), "ok": self.ok, "problems": list(self.problems), "notes": list(self.notes)}
        difference = self.max_relative_difference
        values["max_relative_difference"] = (
            difference if difference is None or math.isfinite(difference) else None
        )
        values["layers"] = [layer.to_json() for layer in self.layers]
        for key in ("first_large_difference", "largest_rise"):
            layer = getattr(self, key)
            values[key] = None if layer is None else layer.to_json()
        return values


def verify(
    subject: Source,
    *,
    data: Data | str | Path | None = None,
    against: Source | None = None,
    max_accuracy_drop: float | None = None,
    tolerance: float = 0.5,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a bundle, a file or a model.

    Args:
        subject: what `cveff.export.subjects.open_subject` opens.
        data: labelled images; accuracy is measured on `test` where there is one, else `val`. Without, hashes
            are checked and logits compared on random pixels.
        against: the original: a model, a saved folder or a file. By default a bundle's own `model.onnx`.
        max_accuracy_drop: points the subject may lose against the original; by default what the bundle was made
            with, else 1.
        tolerance: points by which a measured accuracy may lie under the manifest's claim: another processor
            rounds otherwise.
        threads: of every engine; by default every core this process may use.

    Returns:
        a `Verification`; a bundle that is damaged or was tampered with is one that is not `ok`.

    Raises:
        CveffError: the subject does not exist or cannot be opened.
        DataError: data whose classes are not the subject's.
    """
    progress = progress or Silent()
    if data is not None and not isinstance(data, Data):
        from cveff.data.loading import load as load_data

        data = load_data(data, progress=progress)
    with ExitStack() as stack:
        try:
            opened = open_subject(subject, threads=threads)
        except BundleError as error:
            return _damaged(subject, error)
        stack.callback(opened.close)
        reference = _open_reference(opened, against, threads)
        if reference is not None:
            stack.callback(reference.close)
            _check_same_task(opened, reference)
        found = Verification(
            opened.name,
            opened.kind,
            opened.engine,
            opened.precision or _precision(opened),
            reference=None if reference is None else reference.name,
            notes=_machine_notes(opened),
        )
        if opened.task != "classification":
            return _task_agreement(found, opened, reference, data)
        found = _score(found, opened, reference, data, progress)
        found = _claims(found, opened, tolerance)
        found = _limits(found, opened, max_accuracy_drop)
        if opened.cascade is not None:
            return check_stages(found, opened.cascade, reference, data, FLOAT_TOLERANCE)
        if reference is not None:
            progress.message("comparing layers")
            found = _layers(found, opened, reference, data)
    return found


def _damaged(subject: Source, error: BundleError) -> Verification:
    assert not isinstance(subject, (Model, tuple))  # only a path can be a bundle
    return Verification(Path(subject).name, "bundle", "", "", problems=(str(error),))


def _open_reference(subject: Subject, against: Source | None, threads: int | None) -> Subject | None:
    if against is not None:
        return open_subject(against, threads=threads)
    if subject.cascade is not None and subject.file is not None:
        whole = f"{subject.file.engine}:{subject.path}"
        return open_subject(whole, threads=threads, name=f"{subject.name}/{subject.file.file}")
    own = _own_onnx(subject)
    if own is None or own == subject.path:
        return None
    return open_subject(f"onnxruntime:{own}", threads=threads, name=f"{subject.name}/{own.name}")


def _own_onnx(subject: Subject) -> Path | None:
    """The float32 ONNX file in a bundle."""
    if subject.folder is None:
        return None
    path = subject.folder / ONNX
    return path if path.is_file() else None


def _check_same_task(subject: Subject, reference: Subject) -> None:
    if subject.task != reference.task:
        raise DataError(
            f"{subject.name} is a {subject.task} model, {reference.name} a {reference.task} model; they are not the "
            "same model"
        )
    if subject.labels and reference.labels and len(subject.labels) != len(reference.labels):
        raise DataError(
            f"{subject.name} has {len(subject.labels)} classes, {reference.name} has {len(reference.labels)}; they "
            "are not the same model"
        )
    if subject.spec is not None and reference.spec is not None and subject.spec.size != reference.spec.size:
        raise CveffError(
            f"{subject.name} takes images of {subject.spec.size}, {reference.name} of {reference.spec.size}; they "
            "are not the same model"
        )


def _task_agreement(
    found: Verification, subject: Subject, reference: Subject | None, data: Data | None
) -> Verification:
    """Share of detections, or of pixels, that are the reference's, on random images."""
    if data is not None:
        raise DataError(
            f"{subject.name} is a {subject.task} model, whose accuracy is not measured; leave data out"
        )
    if reference is None:
        return found
    images = subject.example(TASK_IMAGES)
    ours, theirs = subject.predictor(images), reference.predictor(images)
    if subject.task == "detection":
        share = agreement(unpacked(ours), unpacked(theirs)).share
    else:
        share = float((_labels(ours) == _labels(theirs)).mean())
    found = replace(found, agreement=share)
    if share >= MIN_TASK_AGREEMENT:
        return found
    what = "detections" if subject.task == "detection" else "pixels"
    problem = f"only {share:.2%} of its {what} are {found.reference}'s; {MIN_TASK_AGREEMENT:.0%} are expected"
    return replace(found, problems=(*found.problems, problem))


def _labels(answer: np.ndarray) -> np.ndarray:
    """Class of each pixel, of logits (N, classes, H, W) or of a file that returns classes (N, H, W)."""
    return answer.argmax(1) if answer.ndim == 4 else answer


def _machine_notes(subject: Subject) -> tuple[str, ...]:
    if subject.manifest is None or subject.file is None:
        return ()
    return tuple(f"{note[0].upper()}{note[1:]}." for note in processor_notes(subject.manifest, subject.file))


def _score(
    found: Verification, subject: Subject, reference: Subject | None, data: Data | None, progress: Progress
) -> Verification:
    """Accuracy, agreement and difference; on random pixels, only the difference."""
    predictors = {"subject": subject.predictor}
    if reference is not None:
        predictors["reference"] = reference.predictor
    if data is None:
        if reference is None:
            return found
        pixels = (subject if subject.spec is not None else reference).example(RANDOM_IMAGES)
        logits = {name: predictor(pixels) for name, predictor in predictors.items()}
        difference = relative_difference(logits["subject"], logits["reference"])
        return replace(found, max_relative_difference=difference)
    split = data.evaluation
    if subject.labels and len(subject.labels) != len(data.labels):
        raise DataError(
            f"{subject.name} has {len(subject.labels)} classes but {data.name} has {len(data.labels)}"
        )
    spec = (subject if subject.spec is not None or reference is None else reference).input
    scores: Scores = score(predictors, split, spec, progress, f"measuring on {split.name}")
    problems = tuple(f"{name} {why}" for name, why in scores.errors.items())
    found = replace(found, split=split.name, num_images=len(split), problems=(*found.problems, *problems))
    if "subject" in scores.logits:
        found = replace(found, accuracy=scores.accuracy("subject"))
    if "reference" in scores.logits:
        found = replace(found, reference_accuracy=scores.accuracy("reference"))
    if len(scores.logits) == 2:
        found = replace(
            found,
            agreement=scores.agreement("subject", "reference"),
            max_relative_difference=scores.relative_difference("subject", "reference"),
        )
    return found


def _claims(found: Verification, subject: Subject, tolerance: float) -> Verification:
    """The manifest's accuracy against the measured one, where both are of the same images."""
    if subject.manifest is None or found.accuracy is None:
        return found
    metrics = subject.manifest["metrics"]
    claimed, images = metrics["accuracy"]["deployed"], metrics["images"]
    if claimed is None:
        return found
    if (images["split"], images["count"]) != (found.split, found.num_images):
        note = (
            f"The manifest's accuracy is of {images['count']} images of {images['split']}; these are "
            f"{found.num_images} of {found.split}, so the two are not compared."
        )
        return replace(found, notes=(*found.notes, note))
    chosen = subject.manifest["engine"]
    if (chosen["name"], chosen["file"]) != (subject.engine, _name_in_bundle(subject)):
        return found  # the claim is about another of the bundle's files
    found = replace(found, claimed_accuracy=claimed)
    assert found.accuracy is not None
    short = 100 * (claimed - found.accuracy)
    if short > tolerance + 1e-9:
        problem = (
            f"accuracy is {100 * found.accuracy:.2f}%, {short:.2f} points under the {100 * claimed:.2f}% the manifest "
            "claims: this is other data, or this processor computes the file otherwise"
        )
        return replace(found, problems=(*found.problems, problem))
    return found


def _name_in_bundle(subject: Subject) -> str:
    assert subject.path is not None and subject.folder is not None
    return subject.path.relative_to(subject.folder).as_posix()


def _limits(found: Verification, subject: Subject, max_accuracy_drop: float | None) -> Verification:
    """Accuracy lost against the reference, and for float32 the difference of the logits."""
    problems = list(found.problems)
    if max_accuracy_drop is None:
        selection = {} if subject.manifest is None else subject.manifest["metrics"].get("selection", {})
        max_accuracy_drop = float(selection.get("max_accuracy_drop", 1.0))
    if found.accuracy is not None and found.reference_accuracy is not None:
        drop = 100 * (found.reference_accuracy - found.accuracy)
        if drop > max_accuracy_drop + 1e-9:
            problems.append(
                f"it loses {drop:.2f} points of accuracy against {found.reference}, the limit is {max_accuracy_drop:g}"
            )
    difference = found.max_relative_difference
    if (
        subject.cascade is not None
    ):  # answers of early exits are others by design; `check_stages` looks at the last
        difference = None
    if difference is not None and found.precision == "fp32" and not difference <= FLOAT_TOLERANCE:
        problems.append(
            f"its logits differ from {found.reference}'s by a relative {difference:.1e}; float32 rounding explains "
            f"{FLOAT_TOLERANCE:g} at most, so it computes something else"
        )
    return replace(found, problems=tuple(problems))


def _layers(found: Verification, subject: Subject, reference: Subject, data: Data | None) -> Verification:
    spec_owner = subject if subject.spec is not None else reference
    images = (
        spec_owner.example(LAYER_IMAGES)
        if data is None
        else first_images(data.evaluation, spec_owner.input, LAYER_IMAGES)
    )
    try:
        layers = _compare_layers(subject, reference, images, found.precision)
    except CveffError as error:
        return replace(found, notes=(*found.notes, f"Layers could not be compared: {error}"))
    threshold = FLOAT_TOLERANCE if found.precision == "fp32" else 0.25
    return replace(
        found,
        layers=tuple(layers),
        first_large_difference=first_large_difference(layers, threshold),
        largest_rise=largest_rise(layers),
    )


def _compare_layers(
    subject: Subject, reference: Subject, images: np.ndarray, precision: str
) -> list[LayerParity]:
    """Layers of what runs against layers of the original; none for a module against a module, or an IR."""
    if subject.path is None or (reference.path is not None and reference.path.suffix != ".onnx"):
        return []
    if subject.engine == "aot-inductor":  # machine code has no layers to look into
        return []
    if reference.path is not None:
        return _file_parity(reference.path, subject, images)
    if reference.model is None:
        return []
    if subject.path.suffix == ".onnx" and precision == "fp32":
        return module_parity(reference.model, subject.path, images, threads=subject.threads)
    own = _own_onnx(subject)
    if own is not None:
        return _file_parity(own, subject, images)
    # Quantizers keep tensor names but not the modules behind them, so the original is exported for its names.
    with tempfile.TemporaryDirectory(prefix="cveff-verify-") as folder:
        return _file_parity(export(reference.model, Path(folder) / ONNX, check=False), subject, images)


def _file_parity(original: Path, subject: Subject, images: np.ndarray) -> list[LayerParity]:
    assert subject.path is not None
    if original == subject.path:
        return []
    if subject.engine == "openvino":
        return openvino_layer_parity(original, subject.path, images, threads=subject.threads)
    return layer_parity(original, subject.path, images, threads=subject.threads)


def _precision(subject: Subject) -> str:
    """What a file computes in, from its operators or as it says; a module is what its weights are, taken as fp32."""
    if subject.path is None:
        return "fp32"
    if subject.engine == "aot-inductor":
        return str(read_package(subject.path)["precision"])
    if subject.path.suffix == ".xml":
        return "int8" if "FakeQuantize" in subject.path.read_text(encoding="utf-8") else "fp32"
    import onnx

    graph = onnx.load(subject.path, load_external_data=False).graph
    kinds = {node.op_type for node in graph.node}
    return "int8" if kinds & {"QuantizeLinear", "DequantizeLinear", "QLinearConv"} else "fp32"
