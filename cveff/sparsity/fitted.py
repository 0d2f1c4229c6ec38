"""A method fitted to a network: made from documents, kept as safetensors and JSON, checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cveff.errors import CheckpointError, StepError
from cveff.files import atomic_folder, write_json
from cveff.sparsity.baselines import HotNeurons, Oracle, RandomNeurons
from cveff.sparsity.cats import CATS
from cveff.sparsity.collect import Document
from cveff.sparsity.heads import HeadPredictor
from cveff.sparsity.method import Tensors
from cveff.sparsity.predictor import Predictor
from cveff.sparsity.structure import find_mlps
from cveff.sparsity.teal import TEAL

Method = Oracle | HotNeurons | RandomNeurons | Predictor | HeadPredictor | CATS | TEAL
METHODS: tuple[type[Method], ...] = (Oracle, HotNeurons, RandomNeurons, Predictor, HeadPredictor, CATS, TEAL)
_VERSION = 1
_PROBES = 8
_CLOSE = 2**-7
"""Weights may be rounded to bfloat16 between fitting and use."""


@dataclass(frozen=True)
class Layer:
    """Which MLP (or attention, or linear layer) some tensors were fitted to.

    Attributes:
        path: in the network.
        shape: of the weight that reads its input.
        probe: some of that weight's values: tensors fitted to other weights choose wrongly and say nothing.
    """

    path: str
    shape: tuple[int, int]
    probe: tuple[float, ...]


@dataclass(frozen=True)
class Fitted:
    """A method and what it learned about one network.

    Attributes:
        method: its settings.
        layers: what each of `tensors` belongs to.
        tensors: by name, float32.
        report: figures of the fit, such as a predictor's recall on held-out documents.
    """

    method: Method
    layers: tuple[Layer, ...]
    tensors: tuple[Tensors, ...]
    report: dict[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a folder of `sparsity.json` and `sparsity.safetensors`, atomically.

        Raises:
            CveffError: the folder cannot be written.
        """
        flat = {
            f"{i}.{name}": t.cpu().contiguous()
            for i, part in enumerate(self.tensors)
            for name, t in part.items()
        }
        about = {
            "version": _VERSION,
            "kind": self.method.kind,
            "settings": asdict(self.method),
            "layers": [asdict(layer) for layer in self.layers],
            "report": self.report,
        }
        with atomic_folder(path) as folder:
            write_json(folder / "sparsity.json", about)
            save_file(flat, folder / "sparsity.safetensors")

    def check(self, model: nn.Module) -> None:
        """Raise unless this was fitted to a network with these layers and weights.

        Raises:
            StepError: says which layer differs, and how.
        """
        found = layers_of(self.method, model)
        if len(found) != len(self.layers):
            raise StepError(
                f"this was fitted to {len(self.layers)} layers, and the network has {len(found)}; fit it anew"
            )
        for own, other in zip(self.layers, found, strict=True):
            if (own.path, own.shape) != (other.path, other.shape):
                raise StepError(
                    f"this was fitted to {own.path} {own.shape}, and the network has {other.path} {other.shape}; "
                    "fit it anew"
                )
            a, b = torch.tensor(own.probe), torch.tensor(other.probe)
            if not torch.allclose(a, b, rtol=_CLOSE, atol=1e-6):
                raise StepError(f"this was fitted to other weights of {own.path}; fit it anew")
        self._check_shapes(model)

    def _check_shapes(self, model: nn.Module) -> None:
        wanted: list[dict[str, tuple[int, ...]]]
        if isinstance(self.method, TEAL):
            wanted = [{"threshold": ()} for _ in self.layers]
        elif isinstance(self.method, HeadPredictor):
            wanted = [self.method.head_shapes(attention) for attention in self.method.attentions(model)]
        else:
            method = self.method
            wanted = [method.shapes(mlp) for mlp in find_mlps(model)]
        for layer, tensors, shapes in zip(self.layers, self.tensors, wanted, strict=True):
            own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            if own != shapes:
                raise StepError(f"{layer.path} has tensors {own}, and {shapes} are wanted; fit it anew")


def fit(model: nn.Module, method: Method, documents: Sequence[Document] = ()) -> Fitted:
    """Fit a method to a network.

    Args:
        model: any network whose MLPs `find_mlps` finds, such as transformers' Llama, Qwen, Gemma, Phi and OPT.
        documents: what the network is called with, one a document: token ids (B, T), keyword arguments or images.
            `Oracle` and `RandomNeurons` do without.

    Raises:
        StepError: the network has nothing the method could choose from, or documents are too few.
    """
    layers = layers_of(method, model)
    with torch.no_grad():
        if isinstance(method, TEAL):
            return Fitted(method, layers, tuple(method.fit(model, documents)))
        if isinstance(method, HeadPredictor):
            tensors, report = method.fit_heads(method.attentions(model), model, documents)
        else:
            tensors, report = method.fit(model, find_mlps(model), documents)
    return Fitted(method, layers, tuple(tensors), report)


def load(path: str | Path) -> Fitted:
    """Read a folder that `Fitted.save` wrote.

    Raises:
        CheckpointError: a file is missing, damaged, of a newer version, or the tensors are not those of the settings.
    """
    folder = Path(path)
    try:
        about = json.loads((folder / "sparsity.json").read_text(encoding="utf-8"))
        flat = load_file(folder / "sparsity.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}; fit the method anew") from error
    try:
        return _checked(about, flat)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, StepError) as error:
        raise CheckpointError(
            f"{folder / 'sparsity.json'} is damaged: {error!r}; fit the method anew"
        ) from error


def layers_of(method: Method, model: nn.Module) -> tuple[Layer, ...]:
    """What `method` is fitted to in this network.

    Raises:
        StepError: the network has no MLP.
    """
    if isinstance(method, TEAL):
        return tuple(_layer(path, layer.weight) for path, layer in method.layers(model).items())
    if isinstance(method, HeadPredictor):
        return tuple(_layer(own.path, own.query.weight) for own in method.attentions(model))
    return tuple(_layer(mlp.path, mlp.first[0].weight) for mlp in find_mlps(model))


def _layer(path: str, weight: Tensor) -> Layer:
    rows, columns = weight.shape
    places = torch.linspace(0, 1, _PROBES)
    i, j = (places * (rows - 1)).long(), (places * (columns - 1)).long()
    values = weight.detach()[i.to(weight.device), j.to(weight.device)]
    return Layer(path, (rows, columns), tuple(values.float().cpu().tolist()))


def _checked(about: dict[str, Any], flat: dict[str, Tensor]) -> Fitted:
    if about["version"] != _VERSION:
        raise ValueError(f"version {about['version']} is not {_VERSION}, the one this cveff reads")
    (kind,) = (method for method in METHODS if method.kind == about["kind"])
    method = kind(**about["settings"])
    layers = tuple(
        Layer(
            str(item["path"]),
            (int(item["shape"][0]), int(item["shape"][1])),
            tuple(map(float, item["probe"])),
        )
        for item in about["layers"]
    )
    tensors: tuple[Tensors, ...] = tuple({} for _ in layers)
    for name, value in flat.items():
        place, _, own = name.partition(".")
        if value.dtype != torch.float32 or not bool(value.isfinite().all()):
            raise ValueError(f"tensor {name} is not finite float32")
        tensors[int(place)][own] = value
    report = {str(name): float(value) for name, value in about["report"].items()}
    return Fitted(method, layers, tensors, report)
