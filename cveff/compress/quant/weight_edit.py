"""`QuantizeWeights`: the edit that makes linear layers keep their weights as packed integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from cveff.compress.low_rank_edit import replace
from cveff.compress.quant.packed_linear import PackedLinear, WeightGrid
from cveff.errors import CheckpointError, StepError

_FIELDS = {"bits", "group_size", "symmetric"}


@dataclass(frozen=True)
class QuantizeWeights:
    """Edit: these linear layers are `PackedLinear`.

    Attributes:
        layers: path -> {"bits": 4 or 8, "group_size": 32, 64 or 128, "symmetric": bool}.

    Raises:
        StepError: at construction, for another value.
    """

    layers: Mapping[str, Mapping[str, Any]] = field(hash=False)

    kind: ClassVar[str] = "quantize_weights"

    def __post_init__(self) -> None:
        for path, choice in self.layers.items():
            if not isinstance(choice, Mapping) or set(choice) != _FIELDS:
                raise StepError(
                    f"quantize_weights: layer {path!r} has {choice!r}; give {', '.join(sorted(_FIELDS))}"
                )
            try:
                WeightGrid(**choice)
            except StepError as error:
                raise StepError(f"quantize_weights: layer {path!r}: {error}") from None
        object.__setattr__(self, "layers", {path: dict(choice) for path, choice in self.layers.items()})

    def apply(self, module: nn.Module) -> nn.Module:
        """Replace the layers in place and return `module`; their integers are fresh, their biases stay.

        Raises:
            CheckpointError: a path is no plain linear layer; the edit was made for another network.
        """
        for path, choice in self.layers.items():
            try:
                layer = module.get_submodule(path)
            except AttributeError:
                raise CheckpointError(
                    f"the network has no layer {path!r} to quantize; the edit is another's"
                ) from None
            reason = not_packable(layer)
            if reason:
                raise CheckpointError(
                    f"layer {path!r} cannot be quantized, it {reason}; the edit is another's"
                )
            assert isinstance(layer, nn.Linear)
            replace(module, path, packed_like(layer, WeightGrid(**choice)))
        return module


def not_packable(layer: nn.Module) -> str:
    """Why a layer cannot be a `PackedLinear`; "" if it can."""
    if isinstance(layer, PackedLinear):
        return "is quantized already"
    # Subclasses compute something else from the same weight: adapters, masks, other dtypes.
    if type(layer) is not nn.Linear:
        return f"is a {type(layer).__name__}, not a plain Linear"
    if "weight" not in layer._parameters:
        return "computes its weight (a parametrisation, weight or spectral norm)"
    return ""


def packed_like(layer: nn.Linear, grid: WeightGrid) -> PackedLinear:
    """A layer of the same size, place and bias, whose integers are still to be put."""
    packed = PackedLinear(layer.in_features, layer.out_features, grid, bias=False).to(layer.weight.device)
    packed.bias = layer.bias
    return packed.train(layer.training)
