"""Fold batch norms into the convolutions before them, on the module itself.

In evaluation mode `bn(conv(x)) = γ (W x + b - μ) / σ + β`, which is a convolution with weights `W γ / σ` and
bias `β + (b - μ) γ / σ` (Jacob et al., CVPR 2018, section 3.2). Export does the same to the graph; folding the
module is for what comes between: per-channel weight ranges, pruning, and engines that take PyTorch modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.export.graph_signature import InputKind

from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.runtime.errors import first_line
from cveff.steps import Run

_CONVOLUTIONS = {torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding}
_BATCH_NORMS = {
    torch.ops.aten.batch_norm.default,
    torch.ops.aten._native_batch_norm_legit_no_training.default,
}


@dataclass(frozen=True)
class FoldedBatchNorm:
    """Edit: these batch norms are gone and their convolutions have a bias.

    Attributes:
        pairs: (convolution's module name, batch norm's module name).
    """

    pairs: tuple[tuple[str, str], ...]
    kind: ClassVar[str] = "fold_batch_norm"

    def apply(self, module: nn.Module) -> nn.Module:
        """Fold in place and return `module`.

        Raises:
            StepError: a name is not a convolution or a batch norm of `module`.
        """
        for convolution, norm in self.pairs:
            _fold(module, convolution, norm)
        return module


@dataclass(frozen=True)
class FoldBatchNorm:
    """Step: find every convolution whose only reader is a batch norm, and fold the two."""

    kind: ClassVar[str] = "fold_batch_norm"
    requires: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: Model, run: Run) -> Model:
        """Plan from the `torch.export` graph, then fold.

        Raises:
            StepError: the network cannot be traced, or has no batch norm behind a convolution.
        """
        pairs = find_pairs(model)
        if not pairs:
            raise StepError(
                f"{model.spec.architecture} has no batch norm directly behind a convolution; remove the step"
            )
        edit = FoldedBatchNorm(pairs)
        return with_module(model, edit.apply(model.module), edit)


def find_pairs(model: Model) -> tuple[tuple[str, str], ...]:
    """(convolution, batch norm) module names where the norm is the convolution's only reader, each used once."""
    spec = model.spec.input
    module = model.module
    training = module.training
    device = next(module.parameters()).device
    example = torch.zeros(2, spec.channels, *spec.size, device=device)
    try:
        program = torch.export.export(module.eval(), (example,))
    except Exception as error:
        raise StepError(
            f"{model.spec.architecture} cannot be traced by torch.export: {first_line(error)}"
        ) from error
    finally:
        module.train(training)
    owners = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER and spec.target is not None
    }
    pairs = []
    for node in program.graph.nodes:
        if node.target not in _BATCH_NORMS or len(node.args) < 2:
            continue
        source = node.args[0]
        if getattr(source, "target", None) not in _CONVOLUTIONS or len(source.users) != 1:
            continue
        convolution, norm = _owner(source.args[1], owners), _owner(node.args[1], owners)
        if convolution and norm:
            pairs.append((convolution, norm))
    return tuple(pairs)


def _owner(parameter: Any, owners: dict[str, str]) -> str | None:
    """The module whose `weight` this graph input is; None when it is shared, computed or read more than once."""
    name = owners.get(getattr(parameter, "name", ""), "")
    if not name.endswith(".weight") or len(parameter.users) != 1:
        return None
    return name.removesuffix(".weight")


def _fold(module: nn.Module, convolution_name: str, norm_name: str) -> None:
    try:
        convolution, norm = module.get_submodule(convolution_name), module.get_submodule(norm_name)
    except AttributeError as error:
        raise StepError(f"cannot fold {norm_name} into {convolution_name}: {error}") from error
    if not isinstance(convolution, nn.modules.conv._ConvNd) or not isinstance(
        norm, nn.modules.batchnorm._BatchNorm
    ):
        raise StepError(
            f"cannot fold {norm_name} ({type(norm).__name__}) into {convolution_name} ({type(convolution).__name__}); "
            "a convolution and a batch norm are needed"
        )
    assert norm.running_var is not None and norm.running_mean is not None
    with torch.no_grad():
        # float64: the fold is done once, and its rounding would add to every output.
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias = convolution.bias.double() if convolution.bias is not None else torch.zeros_like(scale)
        bias = (bias - norm.running_mean.double()) * scale
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        weight = convolution.weight
        shape = (-1, *([1] * (weight.ndim - 1)))
        weight.copy_((weight.double() * scale.reshape(shape)).to(weight.dtype))
        convolution.bias = nn.Parameter(bias.to(weight.dtype))
    parent_name, _, leaf = norm_name.rpartition(".")
    setattr(module.get_submodule(parent_name), leaf, _without_norm(norm))


def _without_norm(norm: nn.Module) -> nn.Module:
    """What remains of a batch norm: timm's `BatchNormAct2d` holds a dropout and an activation too."""
    rest = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else nn.Identity()
