"""What the report shows beside the manifest's figures: mistakes, pictures, layers, the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cveff.data.dataset import Data, Split
from cveff.errors import CveffError
from cveff.export.build_candidates import ONNX
from cveff.export.candidates import Candidate
from cveff.export.deploy_checks import Images
from cveff.export.report_plots import Bar
from cveff.export.report_sections import Evidence, Sample
from cveff.export.scoring import REFERENCE, Scores, first_images
from cveff.measure.accuracy import confusion
from cveff.measure.onnx_parity import layer_parity
from cveff.measure.openvino_parity import openvino_layer_parity
from cveff.measure.parity import LayerParity, largest_rise
from cveff.runtime.engine import softmax
from cveff.runtime.input_spec import InputSpec

LAYER_IMAGES = 16
NUM_WRONG, NUM_RIGHT = 12, 12


def collect_evidence(
    chosen: Candidate,
    candidates: Sequence[Candidate],
    images: Images,
    scores: Scores,
    spec: InputSpec,
    folder: Path,
    *,
    data: Data | None,
    warnings: Sequence[str],
) -> Evidence:
    """Gather it for `chosen`.

    Args:
        scores: of the original and of the chosen on `images.evaluation`.
        folder: where `model.onnx` and the candidates' files were built.
        warnings: what is known already; the data's and those of comparing layers are added.
    """
    notes = list(warnings)
    layers: list[LayerParity] = []
    title = ""
    subject = _quantized(chosen, candidates)
    if subject is not None and subject.path is not None:
        batch = first_images(images.selection, spec, LAYER_IMAGES)
        try:
            layers = compare_layers(folder / ONNX, subject, batch)
            title = _layers_title(subject, layers, len(batch))
        except CveffError as error:
            notes.append(f"The layers of {subject.name} could not be compared: {error}")
    if data is not None:
        notes += data.report.warnings
    logits = scores.logits[chosen.name]
    return Evidence(
        confusion=None if scores.targets is None else confusion(logits, scores.targets),
        samples=_samples(images.evaluation, images.labels, logits, scores.logits[REFERENCE], scores.targets),
        layers=[
            Bar(
                f"{layer.module or layer.name} ({layer.op})",
                layer.relative_difference,
                f"cosine {layer.cosine:.5f}",
            )
            for layer in layers
        ],
        layers_title=title,
        data=_data_lines(images, data),
        warnings=notes,
    )


def compare_layers(reference: Path, candidate: Candidate, batch: np.ndarray) -> list[LayerParity]:
    """Each layer of the candidate's file against the float32 file's.

    Raises:
        CveffError: the two have no layer in common, or one cannot be run.
    """
    assert candidate.path is not None
    if candidate.engine == "openvino":
        return openvino_layer_parity(reference, candidate.path, batch, threads=candidate.threads)
    return layer_parity(reference, candidate.path, batch, threads=candidate.threads)


def _quantized(chosen: Candidate, candidates: Sequence[Candidate]) -> Candidate | None:
    """The int8 file whose layers are worth showing: the chosen, or else the first that was built."""
    int8 = [c for c in candidates if c.precision.startswith("int8") and not c.error]
    return next((c for c in int8 if c.name == chosen.name), int8[0] if int8 else None)


def _layers_title(candidate: Candidate, layers: Sequence[LayerParity], count: int) -> str:
    standing = "chosen" if candidate.chosen else "not chosen"
    text = (
        f"How far each layer of {candidate.name} ({standing}) is from float32: max|difference| / max|float32| "
        f"over {count} images, in execution order."
    )
    rise = largest_rise(layers)
    return text if rise is None else f"{text} The error rises most at {rise.module or rise.name} ({rise.op})."


def _samples(
    split: Split, labels: Sequence[str], logits: np.ndarray, reference: np.ndarray, targets: np.ndarray | None
) -> list[Sample]:
    predicted, original = logits.argmax(axis=1), reference.argmax(axis=1)
    confidence = softmax(logits).max(axis=1)
    wrong = predicted != (original if targets is None else targets)
    shown = np.flatnonzero(wrong)
    shown = shown[np.argsort(-confidence[shown], kind="stable")][:NUM_WRONG]
    right = _spread(np.flatnonzero(~wrong), predicted, NUM_RIGHT)
    samples = []
    for index in [*shown, *right]:
        picture = np.asarray(split.image(int(index)))
        samples.append(
            Sample(
                image=picture if picture.ndim == 3 else picture[:, :, None],
                predicted=labels[predicted[index]],
                probability=float(confidence[index]),
                truth=None if targets is None else labels[targets[index]],
                reference=labels[original[index]],
            )
        )
    return samples


def _spread(indices: np.ndarray, classes: np.ndarray, count: int) -> list[int]:
    """`count` of `indices`, taking the classes in turn."""
    turns: dict[int, int] = {}
    keyed = []
    for index in indices:
        name = int(classes[index])
        turns[name] = turns.get(name, 0) + 1
        keyed.append((turns[name], name, int(index)))
    return [index for _, _, index in sorted(keyed)[:count]]


def _data_lines(images: Images, data: Data | None) -> list[tuple[str, str]]:
    if images.calibration is None:
        calibration = "none: the target has no int8 candidate"
    else:
        calibration = f"{len(images.calibration):,} images"
    lines = [
        ("Chosen on", f"{images.selection.name}: {len(images.selection):,} images"),
        ("Figures from", f"{images.evaluation.name}: {len(images.evaluation):,} images"),
        ("Calibration", calibration),
    ]
    if data is None:
        return [*lines, ("Labels", "none: agreement with the original was measured, not accuracy")]
    report = data.report
    splits = (data.train, data.val, data.test)
    sizes = ", ".join(f"{split.name} {len(split):,}" for split in splits if split is not None)
    return [
        ("Data set", f"{data.name}: {sizes}"),
        *lines,
        ("Images left out", str(len(report.bad_images))),
        ("Equal images in two splits", str(len(report.duplicates))),
    ]
