"""`Model` = architecture's name + edits + weights. Build it, save it, load it; no pickles are written or read."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from torch import nn

import cveff.backbones  # noqa: F401  (registers cveff's own architectures with timm)
from cveff.edits import Edit, edit_from_json, edit_to_json
from cveff.errors import CheckpointError, CveffError, UnknownModelError
from cveff.files import atomic_folder, write_json, write_tensors
from cveff.runtime.errors import first_line
from cveff.runtime.input_spec import InputSpec
from cveff.state import load_weights
from cveff.tasks import architectures as tasks
from cveff.tasks.architectures import Task

CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model but its weights; JSON both ways.

    Attributes:
        architecture: a timm name, one of cveff's own (`cveff models`), or one of `cveff.tasks.architectures`.
        arguments: keyword arguments of `timm.create_model`, or of `cveff.tasks.architectures.build`, JSON values
            only (`num_classes`, `in_chans`, …).
        input: what the exported file takes.
        labels: one name a class, in the order of the logits.
        edits: structural changes, in the order they were made.
    """

    architecture: str
    arguments: Mapping[str, Any]
    input: InputSpec
    task: Task = "classification"
    labels: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values; `from_json` is its inverse."""
        return {
            "architecture": self.architecture,
            "arguments": dict(self.arguments),
            "input": self.input.to_json(),
            "task": self.task,
            "labels": list(self.labels),
            "edits": [edit_to_json(edit) for edit in self.edits],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Rebuild a spec from `to_json`'s output.

        Raises:
            CheckpointError: a key is missing or a value does not fit.
        """
        try:
            task = values["task"]
            if task not in get_args(Task):
                raise CheckpointError(f"task {task!r} is unknown; known: {get_args(Task)}")
            return cls(
                architecture=values["architecture"],
                arguments=dict(values["arguments"]),
                input=InputSpec.from_json(values["input"]),
                task=task,
                labels=tuple(values["labels"]),
                edits=tuple(edit_from_json(edit) for edit in values["edits"]),
            )
        except KeyError as error:
            raise CheckpointError(
                f"model description lacks the key {error}; it was not written by cveff.save"
            ) from None


@dataclass
class Model:
    """A `ModelSpec` and the network built from it.

    `module` takes float (N, C, H, W), already normalised, and returns logits (N, classes); of the task "detection",
    boxes (N, A, 4) and scores (N, A, classes); of the task "segmentation", logits (N, classes, H, W).
    """

    spec: ModelSpec
    module: nn.Module = field(repr=False)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, batch-norm statistics not counted."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def create(
    architecture: str,
    num_classes: int | None = None,
    *,
    labels: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int = 3,
    input: InputSpec | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    timm_arguments: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Model:
    """Build a model by name.

    Args:
        architecture: any timm model name, one of cveff's own, or a detection or segmentation network of
            `cveff.tasks.architectures`, whose classes are counted with the background.
        num_classes: number of logits; by default the number of `labels`, or what the architecture has.
        labels: one name a class; by default "0", "1", ….
        image_size: side in pixels, or (height, width); by default what the architecture was designed for.
        channels: 1 or 3.
        input: the whole `InputSpec`, in place of `image_size` and `channels`; by default timm's mean, std,
            interpolation and crop for this architecture.
        weights: a `.safetensors`, `.pth`, `.pt` or `.bin` state dict (pickles are read with
            `weights_only=True`), loaded strictly.
        pretrained: let timm (or torchvision) download its weights (needs a network).
        **arguments: passed to `timm.create_model` (or torchvision's builder) and kept in the spec; JSON values only.
        timm_arguments: the same, for names that mean something else here (a ResNet's `channels`).

    Raises:
        UnknownModelError: no such architecture; the message lists close matches.
        CheckpointError: `weights` is damaged or belongs to another architecture.
    """
    if not is_architecture(architecture):
        raise UnknownModelError(_unknown_model(architecture))
    if labels is not None and num_classes is None:
        num_classes = len(labels)
    if labels is not None and len(labels) != num_classes:
        raise CveffError(f"{len(labels)} labels were given for {num_classes} classes; give one a class")
    arguments |= timm_arguments or {}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if input is not None:
        image_size, channels = input.size, input.channels
    if architecture in tasks.ARCHITECTURES:
        if channels != 3:
            raise CveffError(f"{architecture} takes 3 channels (RGB), not {channels}")
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        return _create_for_task(architecture, arguments, labels, size, input, weights, pretrained)
    if channels != 3:
        arguments["in_chans"] = channels
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    module, arguments = _build_for_size(architecture, arguments, size, pretrained)
    config: Mapping[str, Any] = getattr(module, "pretrained_cfg", {})
    if input is None:
        input = _input_spec(config, size, channels)
    classes = int(getattr(module, "num_classes", 0) or num_classes or 0)
    spec = ModelSpec(
        architecture=architecture,
        arguments=arguments,
        input=input,
        labels=tuple(labels) if labels is not None else tuple(str(index) for index in range(classes)),
    )
    model = Model(spec, module)
    if weights is not None:
        load_weights(module, weights, architecture)
    return model


def is_architecture(name: str) -> bool:
    """Whether `create` knows the name."""
    return name in tasks.ARCHITECTURES or bool(timm.is_model(name))


def build(spec: ModelSpec) -> Model:
    """Build `spec`'s architecture with fresh weights and replay its edits."""
    if spec.architecture in tasks.ARCHITECTURES:
        module = tasks.build(spec.architecture, spec.arguments, spec.input.size)
    elif timm.is_model(spec.architecture):
        module = timm.create_model(spec.architecture, **spec.arguments)
    else:
        raise UnknownModelError(_unknown_model(spec.architecture))
    for edit in spec.edits:
        module = edit.apply(module)
    return Model(spec, module)


def save(model: Model, path: str | Path) -> None:
    """Write `model` as a folder of `model.json` and `weights.safetensors`, atomically.

    Raises:
        CveffError: the folder cannot be written.
    """
    save_weights(model.spec, model.module.state_dict(), path)


def save_weights(spec: ModelSpec, weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """`save` for weights that are in no module: the state dict of a network that `spec` describes.

    Raises:
        CveffError: the folder cannot be written.
    """
    # Tied weights share storage, which safetensors refuses; copies load back to the same values.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    with atomic_folder(path) as folder:
        write_tensors(folder / "weights.safetensors", state)
        write_json(folder / "model.json", {"checkpoint_version": CHECKPOINT_VERSION, **spec.to_json()})


def load(path: str | Path) -> Model:
    """Read what `save` wrote: build the architecture, replay the edits, load the weights strictly.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged, or newer than this program.
    """
    model = build(load_spec(path))
    load_weights(model.module, Path(path) / "weights.safetensors", model.spec.architecture)
    model.module.eval()
    return model


def load_spec(path: str | Path) -> ModelSpec:
    """What `save` wrote, without building the network.

    Raises:
        CheckpointError: the folder is missing, its description is damaged, or newer than this program.
    """
    path = Path(path)
    description = path / "model.json"
    if not description.is_file():
        raise CheckpointError(
            f"{path} is not a saved model (no model.json); give a folder written by cveff.save or `cveff train`"
        )
    try:
        values = json.loads(description.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{description} is not valid JSON ({error}); the checkpoint is damaged"
        ) from error
    version = values.get("checkpoint_version")
    if not isinstance(version, int) or version > CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {version!r}, this cveff reads up to {CHECKPOINT_VERSION}; upgrade cveff"
        )
    return ModelSpec.from_json(values)


def with_module(model: Model, module: nn.Module, *edits: Edit) -> Model:
    """A `Model` of `module`, with `edits` appended to the spec's."""
    return Model(replace(model.spec, edits=(*model.spec.edits, *edits)), module)


def _create_for_task(
    architecture: str,
    arguments: dict[str, Any],
    labels: Sequence[str] | None,
    size: tuple[int, int] | None,
    input: InputSpec | None,
    weights: str | Path | None,
    pretrained: bool,
) -> Model:
    """A detection or segmentation network; without labels or their number, the classes of its published weights."""
    known = tasks.ARCHITECTURES[architecture]
    if pretrained:
        arguments = {**known.published, **arguments}
    if labels is None:
        count = arguments.get("num_classes")
        labels = tasks.published_labels(architecture) if count is None else [str(i) for i in range(count)]
    arguments["num_classes"] = len(labels)
    input = input or replace(known.input, size=size or known.input.size)
    module = tasks.build(architecture, arguments, input.size)
    if pretrained:
        tasks.load_published(module, architecture)
    if weights is not None:
        load_weights(module, weights, architecture)
    return Model(ModelSpec(architecture, arguments, input, known.task, tuple(labels)), module)


def _build_for_size(
    architecture: str, arguments: dict[str, Any], size: tuple[int, int] | None, pretrained: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Pass `img_size` to architectures built for one size (ViT, Swin, mixers), and not to the others."""
    if size is not None and "img_size" not in arguments:
        sized = {**arguments, "img_size": list(size)}
        try:
            return _create(architecture, sized, pretrained), sized
        except TypeError as error:
            if "img_size" not in str(error):
                raise CveffError(f"{architecture} does not take these arguments: {error}") from error
    try:
        return _create(architecture, arguments, pretrained), arguments
    except TypeError as error:
        raise CveffError(f"{architecture} does not take these arguments: {error}") from error


def _create(architecture: str, arguments: Mapping[str, Any], pretrained: bool) -> nn.Module:
    """timm's `create_model`, with one clear error where its weights cannot be had."""
    try:
        module: nn.Module = timm.create_model(architecture, pretrained=pretrained, **arguments)
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise
        raise CheckpointError(
            f"pretrained weights of {architecture} cannot be had ({first_line(error)}); check the network, "
            "give a file with weights=…, or train without pretrained"
        ) from error
    return module


def _input_spec(config: Mapping[str, Any], size: tuple[int, int] | None, channels: int) -> InputSpec:
    mean, std = config.get("mean", (0.5,) * 3), config.get("std", (0.5,) * 3)
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    default = config.get("input_size", (3, 224, 224))[1:]
    interpolation = config.get("interpolation", "bicubic")
    return InputSpec(
        size=(int((size or default)[0]), int((size or default)[1])),
        channels=channels,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=interpolation if interpolation in ("bilinear", "bicubic", "nearest") else "bicubic",
        crop=float(config.get("crop_pct") or 0.875),
        crop_mode=config.get("crop_mode") or "center",
    )


def _unknown_model(name: str) -> str:
    close = difflib.get_close_matches(name, [*tasks.ARCHITECTURES, *timm.list_models()], n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else "`cveff models` lists them."
    return f"no architecture is called {name!r}; {hint}"
