"""Merge the branches of re-parameterisable blocks (RepVGG, MobileOne, FastViT, RepViT, …) into one convolution.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again" (CVPR 2021), section 3.3: a batch norm is an affine
map and a 1×1 or identity branch is a 3×3 kernel, so their sum is one 3×3 convolution. The blocks' own modules
hold the arithmetic; this file decides, applies and checks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.utils.model import reparameterize_model
from torch import nn

from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.steps import Run

_METHODS = ("reparameterize", "fuse", "switch_to_deploy")
_TOLERANCE = 1e-3
"""Largest relative difference of the logits accepted; float32 sums in another order stay far below it
("merged" in model_zoo/results/choices.json)."""


def has_branches(module: nn.Module) -> bool:
    """Whether some block of `module` can still be merged."""
    # The network itself may have a `fuse` (RepViT's walks its blocks), which stays after the merge.
    return any(is_mergeable(child) for child in module.modules() if child is not module)


@dataclass(frozen=True)
class Reparameterize:
    """Merge every mergeable block. It is a step and, having no settings, its own edit.

    The result computes the same function in evaluation mode with fewer layers; it should not be trained further.
    """

    kind: ClassVar[str] = "reparameterize"
    requires: ClassVar[tuple[str, ...]] = ()

    def apply(self, module: nn.Module) -> nn.Module:
        """Merge the branches of `module` in place and return it."""
        training = module.training
        # Blocks merge with the statistics of evaluation, and some only in that mode.
        merged: nn.Module = reparameterize_model(module.eval(), inplace=True)
        return merged.train(training)

    def __call__(self, model: Model, run: Run) -> Model:
        """Merge and check that the logits stayed the same.

        Raises:
            StepError: nothing to merge, or the merged network differs by more than a relative 1e-3.
        """
        if not has_branches(model.module):
            raise StepError(
                f"{model.spec.architecture} has no branches to merge (or they are merged already); "
                "remove the reparameterize step"
            )
        module = self.apply(copy.deepcopy(model.module).cpu())
        difference = _difference(copy.deepcopy(model.module).cpu(), module, model)
        if not difference <= _TOLERANCE:
            raise StepError(
                f"merging the branches of {model.spec.architecture} changed its logits by a relative "
                f"{difference:.1e} (limit {_TOLERANCE:g}); keep the branches: remove the reparameterize step"
            )
        return with_module(model, module, self)


def is_mergeable(module: nn.Module) -> bool:
    if not any(callable(getattr(module, name, None)) for name in _METHODS):
        return False
    # Merged blocks keep their class and mark themselves by `reparam_conv`.
    return getattr(module, "reparam_conv", None) is None


def _difference(before: nn.Module, after: nn.Module, model: Model) -> float:
    spec = model.spec.input
    images = torch.randn(2, spec.channels, *spec.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = before.eval()(images), after.eval()(images)
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))
