"""`CondConv`: convolutions whose kernels are mixed for each image, as a step and as the edit it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import ClassVar

import torch
from torch import Tensor, nn

from cveff.backbones.reparameterize import has_branches
from cveff.compress.distill import Distill
from cveff.dynamic.cond_conv_layer import CondConv2d, not_replaceable
from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.runtime.input_spec import InputSpec
from cveff.steps import Run
from cveff.train.loop import fit


@dataclass(frozen=True)
class ConditionalConvolutions:
    """Edit: these convolutions have `experts` kernels each, mixed for each image.

    Attributes:
        layers: paths of convolutions.
        experts: kernels of each, 2 or more.

    Raises:
        StepError: when applied: a path is no convolution that can be replaced, or there are fewer than two experts.
    """

    layers: tuple[str, ...]
    experts: int
    kind: ClassVar[str] = "cond_conv"

    def apply(self, module: nn.Module) -> nn.Module:
        """Replace the layers in place and return `module`, which computes what it did before."""
        if self.experts < 2:
            raise StepError(f"cond_conv: {self.experts} experts cannot be mixed; give 2 or more")
        for path in self.layers:
            try:
                layer = module.get_submodule(path)
                replaced = CondConv2d(layer, self.experts)  # type: ignore[arg-type]  # it checks
            except (AttributeError, StepError) as error:
                raise StepError(f"cond_conv: layer {path!r} {error}; leave it out") from error
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, replaced.train(layer.training))
        return module


@dataclass(frozen=True)
class CondConv:
    """Give convolutions several kernels, mixed for each image: more capacity at nearly the same arithmetic.

    `W(x) = Σₖ sigmoid(R · mean(x) + b)ₖ Wₖ` (CondConv: Yang et al., NeurIPS 2019, arXiv:1904.04971). The network
    answers as before until it is trained: R is zero, b makes every share 1/K, and the kernels differ by noise whose
    mean over the experts is zero (the paper starts at random).

    Attributes:
        experts: kernels of a layer; the weights of these layers grow as many times.
        at: layers, by names or patterns such as "blocks.5.*"; by default the later half of the convolutions that see
            more than one pixel, where the paper's routing depends most on what is in the image (section 5).
        spread: standard deviation of the noise, as a share of that of the layer's kernel.
        recover: fine-tune afterwards, by default not at all.

    Unsupported: convolutions that standardise their weights (NFNets), and networks with branches to merge. Steps that
    look for plain convolutions (pruning, factorising, folding) come before this one.

    Raises:
        StepError: at construction, for a value out of range.
    """

    experts: int = 4
    at: tuple[str, ...] = ()
    spread: float = 0.1
    recover: Distill | None = None

    kind: ClassVar[str] = "cond_conv"
    requires: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise StepError(f"cond_conv.experts is {self.experts!r}; give 2 or more")
        if not 0 < self.spread < float("inf"):
            raise StepError(
                f"cond_conv.spread is {self.spread!r}; give a positive number: equal experts stay equal in training"
            )
        if self.recover is not None and self.recover.train.epochs == 0:
            raise StepError("cond_conv.recover.train.epochs is 0; train for some, or leave recover out")

    def __call__(self, model: Model, run: Run) -> Model:
        """Replace the layers, and fine-tune if asked to.

        Raises:
            StepError: a pattern matches nothing or a layer that cannot be replaced, none can, the network still has
                branches to merge, or fine-tuning has no data.
            TrainingError, CheckpointError: as `Train`.
        """
        if self.recover is not None and (run.data is None or run.data.train is None):
            raise StepError("CondConv fine-tunes, which needs data; pass data=… with a training split")
        if has_branches(model.module):
            raise StepError(
                f"{model.spec.architecture} has branches, which cannot be merged once kernels depend on the image; "
                "apply Reparameterize first"
            )
        edit = ConditionalConvolutions(self._choose(model), self.experts)
        made = with_module(model, edit.apply(model.module), edit)
        self._spread(made.module, edit.layers, run.seed)
        run.progress.message(
            f"{len(edit.layers)} convolutions of {self.experts} experts; {made.num_parameters:,} parameters"
        )
        if self.recover is not None:
            made = fit(made, self.recover.train, run, self.recover.objective(made, run))
        return Model(made.spec, made.module.cpu().eval())

    def _choose(self, model: Model) -> tuple[str, ...]:
        seen = _convolutions(model.module, model.spec.input)
        if not self.at:
            free = [path for path, side in seen.items() if side > 1 and not _reason(model.module, path)]
            if not free:
                raise StepError(f"{model.spec.architecture} has no convolution that kernels can be mixed for")
            return tuple(free[len(free) // 2 :])
        for pattern in self.at:
            if not any(fnmatch(path, pattern) for path in seen):
                raise StepError(
                    f"cond_conv.at: {pattern!r} is no convolution; there are {', '.join(seen) or 'none'}"
                )
        chosen = tuple(path for path in seen if any(fnmatch(path, pattern) for pattern in self.at))
        for path in chosen:
            reason = _reason(model.module, path)
            if reason:
                raise StepError(f"cond_conv.at: layer {path!r} {reason}; leave it out")
        return chosen

    def _spread(self, module: nn.Module, layers: Sequence[str], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path in layers:
                weight = module.get_submodule(path).get_parameter("weight")
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                noise = self.spread * weight[0].std(correction=0).cpu() * (noise - noise.mean(0))
                weight.add_(noise.to(weight))


@torch.no_grad()
def _convolutions(module: nn.Module, spec: InputSpec) -> dict[str, int]:
    """Paths of the convolutions that are called, in order, and the larger side of what each is given, in pixels."""
    found: dict[str, int] = {}

    def note(path: str) -> object:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.setdefault(path, max(inputs[0].shape[2:]))

        return hook

    handles = [
        part.register_forward_pre_hook(note(path))  # type: ignore[arg-type]
        for path, part in module.named_modules()
        if isinstance(part, nn.Conv2d)
    ]
    like = next(module.parameters())
    was_training = module.training
    try:
        module.eval()(torch.zeros(1, spec.channels, *spec.size, device=like.device, dtype=like.dtype))
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()
    return found


def _reason(module: nn.Module, path: str) -> str:
    return not_replaceable(module.get_submodule(path))
