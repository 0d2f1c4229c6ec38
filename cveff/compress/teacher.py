"""The model that is imitated: where it comes from, whether its classes fit, and how it sees the student's images."""

from __future__ import annotations

import copy
import json
from hashlib import blake2b
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.compress.teacher_cache import LogitsCache
from cveff.errors import StepError
from cveff.model import Model, ModelSpec, create, load, load_spec
from cveff.runtime.input_spec import InputSpec


def find_teacher(name: str | None, weights: Path | None, given: Model | None, student: ModelSpec) -> Model:
    """The teacher `Distill` names, or the run's.

    Args:
        name: a folder that `cveff.save` or `cveff train` wrote, or a timm architecture; None: `given`.
        weights: a state dict for that architecture, trained on the student's classes; None: timm's own.
        given: the run's teacher.
        student: whose labels and channels the teacher must fit.

    Raises:
        StepError: there is no teacher, or its classes or channels are not the student's.
        UnknownModelError, CheckpointError: as `cveff.create` and `cveff.load`.
    """
    if name is None:
        if given is None:
            raise StepError(
                "Distill has no teacher; pass teacher=MODEL to cveff.apply, or set teacher to a saved model's "
                "folder or to a timm model's name"
            )
        teacher = given
    elif (folder := _folder(name)) is not None:
        teacher = load(folder)
    elif weights is not None:
        teacher = create(name, labels=student.labels, channels=student.input.channels, weights=weights)
    else:
        teacher = create(name, pretrained=True)
    _check_classes(student, teacher.spec)
    if student.input.channels == 3 and teacher.spec.input.channels == 1:
        raise StepError(
            "the teacher takes grey images and the student RGB; choose a teacher that sees colour"
        )
    return teacher


def check_teacher(name: str, num_classes: int) -> None:
    """Refuse what `find_teacher` would refuse later, without building or downloading anything.

    Raises:
        StepError: a saved model of another number of classes.
        UnknownModelError: neither a saved model nor an architecture.
    """
    folder = _folder(name)
    if folder is None:
        if not timm.is_model(name):
            create(name)  # says that there is no such model, and what comes close
    elif len(labels := load_spec(folder).labels) != num_classes:
        raise StepError(
            f"the teacher {name} has {len(labels)} classes and the data {num_classes}; take a teacher of the same "
            "classes, or fine-tune one on this data first"
        )


class Teacher:
    """A frozen copy of a model that answers to the student's training images.

    The same pixels reach both: they are normalised anew by the teacher's mean and std, and resized where its
    input is of another size. A grey image is shown to a teacher of RGB images as three equal channels.

    Attributes:
        module: the copy, in evaluation mode, without gradients.
        num_classes: logits it gives.
    """

    def __init__(self, model: Model, student: InputSpec, device: torch.device) -> None:
        own = model.spec.input
        self.module: nn.Module = copy.deepcopy(model.module).eval().requires_grad_(False)
        self.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.num_classes = len(model.spec.labels)
        self._size = None if own.size == student.size else own.size
        self._mode = "bilinear" if own.interpolation == "bilinear" else "bicubic"
        self._is_same_range = (own.mean, own.std) == (student.mean, student.std)
        mean, std, student_mean, student_std = (
            torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
            for values in (own.mean, own.std, student.mean, student.std)
        )
        # x is (pixel - student_mean) / student_std; the teacher wants (pixel - mean) / std.
        self._scale = (student_std / std).float().to(device)
        self._shift = ((student_mean - mean) / std).float().to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, cache: LogitsCache | None = None) -> Tensor:
        """Logits (N, classes) float32 for the student's images (N, C, H, W)."""
        if cache is not None:
            return cache.through(images, self)
        logits: Tensor = self.module(self.view(images))
        return logits.float()

    def view(self, images: Tensor) -> Tensor:
        """The student's normalised images as the teacher takes them: (N, C', H', W') float."""
        if not self._is_same_range:
            images = images * self._scale + self._shift
        if self._size is not None:
            images = F.interpolate(images, self._size, mode=self._mode, antialias=True)
        return images


def fingerprint(model: Model) -> str:
    """A hash of a model's description and weights."""
    digest = blake2b(json.dumps(model.spec.to_json(), sort_keys=True).encode(), digest_size=16)
    for name, value in model.module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _folder(name: str) -> Path | None:
    """The saved model at `name`, itself or the `model/` in a run's folder."""
    folders = (Path(name), Path(name) / "model")
    return next((folder for folder in folders if (folder / "model.json").is_file()), None)


def _check_classes(student: ModelSpec, teacher: ModelSpec) -> None:
    if len(student.labels) != len(teacher.labels):
        raise StepError(
            f"the teacher {teacher.architecture} has {len(teacher.labels)} classes and the student "
            f"{len(student.labels)}; take a teacher of the student's classes, or fine-tune one on this data first"
        )
    numbered = tuple(str(index) for index in range(len(student.labels)))
    if student.labels == teacher.labels or numbered in (student.labels, teacher.labels):
        return  # a model made without names numbers its classes: their order is all there is to go by
    differing = [
        f"class {index} is {theirs!r} to the teacher and {ours!r} to the student"
        for index, (ours, theirs) in enumerate(zip(student.labels, teacher.labels, strict=True))
        if ours != theirs
    ]
    raise StepError(
        f"both models have {len(student.labels)} classes, but {len(differing)} differ: {'; '.join(differing[:3])}; "
        "take a teacher of the student's classes in the student's order"
    )
