"""What `deploy` refuses before any work: an output it must not touch, labels that do not fit, no images."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cveff.data.dataset import Data, OnBadImage, Split
from cveff.data.sampling import calibration_images
from cveff.errors import CveffError, DataError, StepError
from cveff.model import Model
from cveff.progress import Progress
from cveff.runtime.manifest import FILE_NAME
from cveff.runtime.preprocess import preprocess
from cveff.target import Target

FEW_IMAGES = 100
"""Below this many images a share of a point cannot be seen, and the report says so."""


@dataclass(frozen=True)
class Images:
    """The images a deployment uses, chosen before it starts.

    Attributes:
        calibration: (count, H, W, C) uint8; None where the target has no candidate that needs them.
        selection: candidates are compared on these.
        evaluation: the figures of the chosen one and of the original come from these.
        labels: one name a class.
        warnings: what a reader must know about them.
    """

    calibration: np.ndarray | None
    selection: Split
    evaluation: Split
    labels: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def is_labelled(self) -> bool:
        """Whether accuracy can be measured."""
        return self.selection.targets is not None


def check_out(out: str | Path) -> Path:
    """Refuse a path that is a file, holds something else than a bundle, or cannot be written.

    Raises:
        CveffError: says which, and what to do.
    """
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise CveffError(f"{path} is an existing file; give the name of a folder, such as {path.name}.bundle")
    try:
        if path.is_dir() and any(path.iterdir()) and not (path / FILE_NAME).is_file():
            raise CveffError(
                f"{path} is a folder that holds something else than a bundle (no {FILE_NAME}); it is not "
                "replaced. Give another name, or empty it"
            )
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        # Permission bits do not tell (root, read-only mounts): only writing does.
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise CveffError(f"cannot write {path}: {error.strerror or error}; give another folder") from error
    return path


def check_settings(max_accuracy_drop: float, num_calibration: int) -> None:
    """Refuse settings out of range.

    Raises:
        StepError: names the setting.
    """
    if not 0 <= max_accuracy_drop <= 100:
        raise StepError(f"max_accuracy_drop is {max_accuracy_drop!r}; give points between 0 and 100")
    if num_calibration < 1:
        raise StepError(f"num_calibration is {num_calibration!r}; give 1 or more, usually 100 to 500")


def check_labels(model: Model, data: Data) -> tuple[tuple[str, ...], list[str]]:
    """The bundle's labels, and warnings.

    A model whose labels are only numbers takes the data's names.

    Raises:
        DataError: the counts differ, or the names do not stand in the same order.
    """
    own, found = model.spec.labels, data.labels
    if len(own) != len(found):
        raise DataError(
            f"the model has {len(own)} classes but {data.name} has {len(found)} "
            f"({', '.join(found[:3])}, …); accuracy cannot be measured with other classes"
        )
    if own == found:
        return own, []
    if own == tuple(str(index) for index in range(len(own))):
        return found, []
    if set(own) & set(found):
        index = next(i for i, (a, b) in enumerate(zip(own, found, strict=True)) if a != b)
        raise DataError(
            f"the labels stand in another order: class {index} is {own[index]!r} for the model and "
            f"{found[index]!r} in {data.name}; order the model's labels as the data's, or rename the folders"
        )
    return own, [
        f"The data names its classes otherwise ({found[0]}, …) than the model ({own[0]}, …); they were taken "
        "to stand in the same order."
    ]


def gather_images(
    model: Model,
    data: Data | None,
    calibration: str | Path | None,
    target: Target,
    *,
    num_calibration: int,
    seed: int,
    on_bad_image: OnBadImage,
    progress: Progress,
) -> Images:
    """Choose and prepare the images, and prove on one that the model can take them.

    Raises:
        StepError: neither data nor a calibration folder.
        DataError: labels that do not fit, no images to calibrate with, or too few.
        InputSizeError, ImageError: an image that the model cannot take.
    """
    if data is None and calibration is None:
        raise StepError(
            "deploy needs images to measure with: pass data=… (a data set with labels: accuracy is measured) "
            "or calibration=… (a folder of images without labels: agreement with the original is measured)"
        )
    needs_calibration = any(
        precision.startswith("int8") or (engine == "tensorrt" and precision != "fp32")
        for engine, precision in target.candidates
    )
    folder = None
    if calibration is not None:
        from cveff.data.loading import load_images

        folder = load_images(calibration, on_bad_image=on_bad_image)
    if data is not None:
        labels, warnings = check_labels(model, data)
        selection, evaluation = data.val, data.evaluation
        source = folder if folder is not None else data.train
        if source is None and needs_calibration:
            raise DataError(
                f"{data.name} has no training images to calibrate int8 with; pass calibration=… (a folder of "
                "images, labels are not needed) or a target without int8 candidates"
            )
        for split in {id(split): split for split in (selection, evaluation)}.values():
            if split.targets is None or not len(split):
                raise DataError(f"split {split.name!r} of {data.name} has no labelled images to measure with")
    else:
        assert folder is not None
        labels, warnings = model.spec.labels, []
        source, selection = halves(folder, seed, needs_calibration)
        evaluation = selection
    if len(selection) < FEW_IMAGES:
        warnings.append(
            f"Only {len(selection)} images were measured: one image is {100 / len(selection):.1f} points."
        )
    spec = model.spec.input
    # The first image of each split fails here, in a second, instead of after the export.
    for split in (selection, evaluation):
        preprocess([split.source(0)], spec)
    images = None
    if needs_calibration:
        assert source is not None
        progress.message(f"calibration: {min(num_calibration, len(source))} images of {source.name}")
        images = calibration_images(source, spec, num_calibration, seed)
    return Images(images, selection, evaluation, labels, tuple(warnings))


def halves(folder: Split, seed: int, needs_calibration: bool = True) -> tuple[Split | None, Split]:
    """One half calibrates, the other measures: on images its ranges were made from, int8 looks better.

    Raises:
        DataError: there are fewer than two images.
    """
    if not needs_calibration:
        return None, folder
    if len(folder) < 2:
        raise DataError(
            f"{folder.name} has {len(folder)} image; at least 2 are needed, better 200: half of them "
            "calibrate, the other half measures"
        )
    order = np.random.default_rng(seed).permutation(len(folder))
    half = len(folder) // 2
    return (
        folder.subset(np.sort(order[:half]), "calibration"),
        folder.subset(np.sort(order[half:]), "held-out"),
    )
