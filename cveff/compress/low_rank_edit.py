"""`LowRankEdit`: layers replaced by chains of plain convolutions or linear layers with fewer channels between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import nn

from cveff.errors import StepError

METHODS = ("svd", "spatial-vertical", "spatial-horizontal", "tucker")
Pair = tuple[int, int]


@dataclass(frozen=True)
class Factor:
    """One layer of a chain.

    Attributes:
        is_linear: a linear layer; otherwise a convolution with zero padding and no groups.
        inputs, outputs: channels.
    """

    is_linear: bool
    inputs: int
    outputs: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def num_weights(self) -> int:
        """Weights without the bias."""
        return self.inputs * self.outputs * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class LowRankEdit:
    """Edit: these layers are chains of factors; the last has a bias.

    Attributes:
        layers: path of a linear layer or convolution -> {"method": one of `METHODS`, "rank": (k,), or for "tucker"
            (input channels, output channels) of its core}. "svd" is the layer's own kernel to k channels and a 1×1
            behind it; "spatial-vertical" a column and then a row, "spatial-horizontal" the reverse.

    Raises:
        StepError: at construction, for a method or a rank that is none.
    """

    layers: Mapping[str, Mapping[str, Any]] = field(hash=False)
    kind: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        known: dict[str, dict[str, Any]] = {}
        for path, choice in self.layers.items():
            if not isinstance(choice, Mapping) or set(choice) != {"method", "rank"}:
                raise StepError(f"low_rank: layer {path!r} has {choice!r}; give a method and a rank")
            method, rank = choice["method"], choice["rank"]
            if method not in METHODS:
                raise StepError(
                    f"low_rank: layer {path!r} has method {method!r}; known: {', '.join(METHODS)}"
                )
            count = 2 if method == "tucker" else 1
            if (
                not isinstance(rank, (list, tuple))
                or len(rank) != count
                or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in rank)
            ):
                raise StepError(
                    f"low_rank: layer {path!r} has rank {rank!r}; {method} takes {count} positive integer(s)"
                )
            known[path] = {"method": method, "rank": tuple(rank)}
        object.__setattr__(self, "layers", known)

    def apply(self, module: nn.Module) -> nn.Module:
        """Replace the layers in place and return `module`; the factors' weights are fresh.

        Raises:
            StepError: a path is no layer that can be factorised, or a rank is larger than the layer allows.
        """
        for path, choice in self.layers.items():
            try:
                layer = module.get_submodule(path)
            except AttributeError as error:
                raise StepError(f"low_rank: there is no layer {path!r}: {error}") from error
            reason = not_factorisable(layer)
            if reason:
                raise StepError(f"low_rank: layer {path!r} {reason}; leave it out")
            replace(module, path, build(layer, path, choice["method"], choice["rank"]))
        return module


def not_factorisable(layer: nn.Module) -> str:
    """Why a layer cannot be replaced by a chain of plain ones; "" if it can."""
    # Subclasses compute something else from the same weight: another padding, standardised weights, adapters.
    if type(layer) is nn.Linear:
        return _computed_weight(layer)
    if type(layer) is not nn.Conv2d:
        return f"is a {type(layer).__name__}, not a plain Linear or Conv2d"
    if layer.groups != 1:
        return "is depthwise" if layer.groups == layer.in_channels else f"has {layer.groups} groups"
    if layer.padding_mode != "zeros":
        return f"pads with {layer.padding_mode!r} instead of zeros"
    if isinstance(layer.padding, str):
        return f"has padding {layer.padding!r} instead of numbers"
    return _computed_weight(layer)


def _computed_weight(layer: nn.Module) -> str:
    if "weight" not in layer._parameters:
        return "computes its weight (a parametrisation, weight or spectral norm)"
    return ""


def geometry(layer: nn.Module, method: str | None = None, rank: tuple[int, ...] = ()) -> tuple[Factor, ...]:
    """The factors of a layer in order of use; the layer itself, as one factor, where `method` is None.

    Raises:
        StepError: the method does not fit the layer; the message goes on from the layer's name.
    """
    if isinstance(layer, nn.Linear):
        inputs, outputs = layer.in_features, layer.out_features
        if method is None:
            return (Factor(True, inputs, outputs),)
        if method != "svd":
            raise StepError(f"is linear and takes svd, not {method}")
        return Factor(True, inputs, rank[0]), Factor(True, rank[0], outputs)
    convolution = cast(nn.Conv2d, layer)
    inputs, outputs = convolution.in_channels, convolution.out_channels
    kernel, stride, dilation = (
        cast(Pair, tuple(value))
        for value in (convolution.kernel_size, convolution.stride, convolution.dilation)
    )
    padding = cast(Pair, tuple(convolution.padding))
    if method is None:
        return (Factor(False, inputs, outputs, kernel, stride, padding, dilation),)
    if method == "svd":
        first = Factor(False, inputs, rank[0], kernel, stride, padding, dilation)
        return first, Factor(False, rank[0], outputs)
    if kernel == (1, 1):
        raise StepError(f"has a 1×1 kernel and takes svd, not {method}")
    if method == "tucker":
        core = Factor(False, rank[0], rank[1], kernel, stride, padding, dilation)
        return Factor(False, inputs, rank[0]), core, Factor(False, rank[1], outputs)
    if 1 in kernel:
        raise StepError(f"has a {kernel[0]}×{kernel[1]} kernel, which {method} cannot split")
    axes = (0, 1) if method == "spatial-vertical" else (1, 0)
    widths = ((inputs, rank[0]), (rank[0], outputs))
    sides = (
        (
            _side(axis, kernel, 1),
            _side(axis, stride, 1),
            _side(axis, padding, 0),
            _side(axis, dilation, 1),
        )
        for axis in axes
    )
    return tuple(Factor(False, *width, *side) for width, side in zip(widths, sides, strict=True))


def largest_rank(layer: nn.Module, method: str) -> tuple[int, ...]:
    """The rank at which `method` reproduces any weight of this layer."""
    (whole,) = geometry(layer)
    height, width = whole.kernel
    return {
        "svd": (min(whole.outputs, whole.inputs * height * width),),
        "spatial-vertical": (min(whole.outputs * width, whole.inputs * height),),
        "spatial-horizontal": (min(whole.outputs * height, whole.inputs * width),),
        "tucker": (whole.inputs, whole.outputs),
    }[method]


def build(layer: nn.Module, path: str, method: str, rank: tuple[int, ...]) -> nn.Sequential:
    """The chain that stands in for `layer`, on its device, in its type and mode, with fresh weights.

    Raises:
        StepError: the method does not fit the layer, or the rank is larger than it allows.
    """
    try:
        factors = geometry(layer, method, rank)
    except StepError as error:
        raise StepError(f"low_rank: layer {path!r} {error}") from None
    most = largest_rank(layer, method)
    if any(k > limit for k, limit in zip(rank, most, strict=True)):
        raise StepError(f"low_rank: layer {path!r} has rank at most {most} by {method}, not {rank}")
    weight = cast(torch.Tensor, layer.weight)
    layers = []
    for index, factor in enumerate(factors):
        bias = index == len(factors) - 1
        layers.append(
            nn.Linear(factor.inputs, factor.outputs, bias, weight.device, weight.dtype)
            if factor.is_linear
            else nn.Conv2d(
                factor.inputs,
                factor.outputs,
                factor.kernel,
                factor.stride,
                factor.padding,
                factor.dilation,
                bias=bias,
                device=weight.device,
                dtype=weight.dtype,
            )
        )
    return nn.Sequential(*layers).train(layer.training)


def replace(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Put `layer` where `path` is."""
    parent, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def _side(axis: int, pair: Pair, other: int) -> Pair:
    """`pair` along one axis, `other` along the second."""
    return (pair[0], other) if axis == 0 else (other, pair[1])
