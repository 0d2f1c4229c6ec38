"""What a user calls a model: a folder that was saved, a card of the zoo, or an architecture with a weights file."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

import timm

from cveff import model_zoo
from cveff.errors import CheckpointError, CveffError, DataError
from cveff.model import Model, create, load
from cveff.state import read_state
from cveff.tasks.architectures import ARCHITECTURES as TASK_ARCHITECTURES


def saved_folder(subject: str | Path) -> Path | None:
    """The saved model at `subject`, itself or the `model/` in a run's folder; None where there is none."""
    path = Path(subject)
    return next((folder for folder in (path, path / "model") if (folder / "model.json").is_file()), None)


def is_architecture(subject: str | Path) -> bool:
    """Whether `subject` names an architecture rather than a model with weights of its own."""
    return (
        saved_folder(subject) is None and str(subject) not in model_zoo.names() and not Path(subject).exists()
    )


def check_result_folder(checkpoint: str, out: Path, record: str, command: str, overwrite: bool) -> None:
    """Refuse a folder that the result of working on `checkpoint` must not go to.

    Args:
        record: the file that earlier results have.
        command: what writes them, for the error.
        overwrite: replace an earlier result.

    Raises:
        CveffError: it is a file, holds the checkpoint itself or what `command` did not write, or an earlier result.
    """
    if out.exists() and not out.is_dir():
        raise CveffError(f"{out} is an existing file; give a folder to --out")
    source = saved_folder(checkpoint)
    if source is not None and out.exists() and out.resolve() in (source.resolve(), *source.resolve().parents):
        raise CveffError(f"{out} holds {checkpoint} itself; give another folder to --out")
    if out.is_dir() and any(out.iterdir()):
        if not (out / record).is_file():
            raise CveffError(
                f"{out} holds files that `{command}` did not write; give another folder to --out"
            )
        if not overwrite:
            raise CveffError(f"{out} holds an earlier result; --overwrite replaces it")


def open_model(
    subject: str | Path,
    *,
    weights: Path | None = None,
    labels: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> Model:
    """A model with weights, in evaluation mode.

    Args:
        subject: a folder written by `cveff.save` or `cveff train`, a card's name, or an architecture's name.
        weights: state dict for an architecture; its classifier tells the number of classes.
        labels, image_size, channels: for an architecture; by default numbers, and what it was designed for.

    Raises:
        UnknownModelError: no such model; the message lists close matches.
        CheckpointError: the folder holds no model, or the weights do not fit.
        CveffError: an architecture without weights, or weights for a model that has its own.
    """
    folder, settings = saved_folder(subject), (weights, labels, image_size, channels)
    if not is_architecture(subject):
        if any(value is not None for value in settings):
            raise CveffError(
                f"{subject} is a saved model; --weights, --labels, --image-size and --channels are for "
                "architectures: remove them"
            )
        if folder is not None:
            return load(folder)
        if str(subject) in model_zoo.names():
            return model_zoo.load(str(subject))
        raise CheckpointError(
            f"{subject} is not a saved model (no model.json); give a folder written by `cveff train`"
        )
    if weights is None:
        if timm.is_model(str(subject)) or subject in TASK_ARCHITECTURES:
            raise CveffError(
                f"{subject} is an architecture without weights; give --weights FILE, or --data to train it"
            )
        create(str(subject))  # says that there is no such model, and what comes close
    model = create(
        str(subject),
        num_classes=_num_classes(str(subject), weights) if labels is None and weights is not None else None,
        labels=labels,
        image_size=image_size,
        channels=channels or 3,
        weights=weights,
    )
    model.module.eval()
    return model


def for_measuring(subject: str) -> Model | str:
    """What `cveff.bench` and `cveff.verify` open: runs and cards are resolved, anything else stands as it is."""
    folder = saved_folder(subject)
    if folder is not None:
        return str(folder)
    return model_zoo.load(subject) if subject in model_zoo.names() else subject


def architectures(pattern: str) -> list[str]:
    """Names that `cveff.create` takes and that match a shell pattern."""
    return sorted({*timm.list_models(pattern), *fnmatch.filter(TASK_ARCHITECTURES, pattern)})


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one a line.

    Raises:
        DataError: the file is missing, empty, or names a class twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"labels file {path} cannot be read ({error}); give a text file, one name a line"
        ) from error
    labels = tuple(line.strip() for line in lines if line.strip())
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if not labels or twice:
        raise DataError(
            f"labels file {path} {'names ' + ', '.join(twice) + ' twice' if twice else 'is empty'}"
        )
    return labels


def _num_classes(architecture: str, weights: Path) -> int | None:
    """Rows of the classifier in a state dict; None where the architecture's classifier is not in it.

    Of a detection or segmentation network None, too: its labels say how many, or it has the published weights'.
    """
    if architecture in TASK_ARCHITECTURES:
        return None
    import torch

    with torch.device("meta"):  # only the names of its parts are needed
        module = timm.create_model(architecture)
    classifier = module.get_classifier()
    if isinstance(classifier, tuple):  # distilled models have two heads of one size
        classifier = classifier[0]
    state = read_state(weights)
    for name, child in module.named_modules():
        if child is classifier:
            found = state.get(f"{name}.weight", state.get(f"{name}.bias"))
            return None if found is None else int(found.shape[0])
    return None
