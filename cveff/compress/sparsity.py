"""Zeros that stay: the masks of sparse weights, the objective that puts them back, and the edit that remembers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cveff.compress.sparse_masks import (
    cubic_sparsity,
    is_two_of_four,
    keep_largest,
    keep_two_of_four,
    zero_share,
)
from cveff.errors import StepError
from cveff.train.objective import Objective

NUM_UPDATES = 100
"""How often at most masks shrink on the way to the final sparsity."""

EFFECT = "size, not speed"
"""What zeros bring on the engines a target can name: ONNX Runtime's and OpenVINO's kernels multiply them like any
other weight. (TensorRT's 2:4 kernels do not.)"""


class Masks(nn.Module):
    """Which weights of which parameters stay, and how much each weight's input counts; buffers, so that training states
    hold them.

    Args:
        keep: parameter's path to a mask like it, true where a weight stays.
        norms: parameter's path to ‖x‖₂ of its inputs, broadcastable to it; empty: all inputs count alike.
    """

    def __init__(self, keep: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.parameters_masked = tuple(keep)
        self._has_norms = bool(norms)
        for path in keep:
            self.register_buffer(_buffer("keep", path), keep[path])
            if norms:
                self.register_buffer(_buffer("norm", path), norms[path])

    def keep(self, path: str) -> Tensor:
        """The mask of the parameter at `path`."""
        return self.get_buffer(_buffer("keep", path))

    @torch.no_grad()
    def apply_to(self, module: nn.Module) -> None:
        """Zero what is masked in `module`."""
        for path in self.parameters_masked:
            # Filled, not multiplied: -1 · 0 would be a zero of another sign.
            weight(module, path).masked_fill_(~self.keep(path), 0)

    @torch.no_grad()
    def choose(self, module: nn.Module, pattern: str, sparsity: float) -> None:
        """Choose masks from `module`'s weights; what is masked already stays so."""
        for path in self.parameters_masked:
            kept = self.keep(path)
            scores = weight(module, path).detach().abs().float()
            if self._has_norms:
                scores = scores * self.get_buffer(_buffer("norm", path))
            scores = scores.masked_fill(~kept, -1)
            if pattern == "2:4":
                kept.copy_(keep_two_of_four(scores))
            else:
                kept.copy_(keep_largest(scores, sparsity, by_row=self._has_norms))


class SparseObjective:
    """An objective whose masked weights are zero after every step.

    Args:
        inner: what is minimised.
        masks: trained weights are held to; they are kept in the training's state.
        sparsity: final share of zeros of an unstructured pattern that grows; None: masks stay as they are.
        ramp: share of all steps over which it grows, in at most `NUM_UPDATES` updates.
        settings: for `identity`.
    """

    def __init__(
        self,
        inner: Objective,
        masks: Masks,
        sparsity: float | None = None,
        ramp: float = 0.0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._inner, self._masks = inner, masks
        self._sparsity, self._ramp, self._settings = sparsity, ramp, dict(settings or {})
        parts = {"masks": masks, **({} if inner.extra is None else {"inner": inner.extra})}
        self.extra: nn.Module | None = nn.ModuleDict(parts)
        self._chosen_at = 0

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The inner objective's."""
        return self._inner.loss(module, images, targets)

    def after_step(self, module: nn.Module, step: int, total_steps: int) -> None:
        """Shrink the masks where that is due, then zero what they mask."""
        self._inner.after_step(module, step, total_steps)
        length = max(1, round(self._ramp * total_steps))
        interval = max(1, length // NUM_UPDATES)
        is_due = step == length or (step < length and step % interval == 0)
        # The second call of a step brings the moving average, which follows the network's masks.
        if self._sparsity is not None and is_due and step != self._chosen_at:
            self._masks.choose(module, "unstructured", cubic_sparsity(step / length, self._sparsity))
            self._chosen_at = step
        self._masks.apply_to(module)

    def identity(self) -> Mapping[str, Any]:
        """The inner objective's, and the masks' settings."""
        return {**self._inner.identity(), **self._settings}


@dataclass(frozen=True)
class Sparsity:
    """Edit: some weights are zeros, and stay so when the model is trained on. The structure is unchanged.

    The masks are the zeros themselves, so there is nothing to replay.

    Attributes:
        pattern: "2:4" or "unstructured".
        sparsity: share of zeros in each layer.
        layers: paths of the sparse parameters.
        effect: what that is good for on the target's engines.
    """

    pattern: str
    sparsity: float
    layers: tuple[str, ...]
    effect: str = EFFECT
    kind: ClassVar[str] = "sparsity"

    def apply(self, module: nn.Module) -> nn.Module:
        """`module`, as it is: the weights that are loaded next bring the zeros."""
        return module

    def constrained(self, objective: Objective, module: nn.Module) -> Objective:
        """`objective`, which also keeps the zeros that `module` has in these layers.

        Raises:
            StepError: a layer is no longer there.
        """
        return SparseObjective(
            objective, Masks({path: weight(module, path) != 0 for path in self.layers}, {})
        )

    def broken(self, module: nn.Module) -> tuple[str, ...]:
        """Layers of `module` that do not have the pattern.

        Raises:
            StepError: a layer is no longer there.
        """
        return tuple(path for path in self.layers if not self._holds(weight(module, path).detach()))

    def _holds(self, values: Tensor) -> bool:
        if self.pattern == "2:4":
            return is_two_of_four(values)
        # Shares are met to a whole weight, in Wanda's case a whole weight of every row.
        return zero_share(values) >= self.sparsity - 0.5 * len(values) / values.numel() - 1e-9


def zeros_of(module: nn.Module, layers: Sequence[str]) -> float:
    """Share of zeros among all weights of `layers`."""
    weights = [weight(module, path) for path in layers]
    return sum(zero_share(item) * item.numel() for item in weights) / sum(item.numel() for item in weights)


def weight(module: nn.Module, path: str) -> nn.Parameter:
    """The parameter at `path`.

    Raises:
        StepError: there is none.
    """
    try:
        return module.get_parameter(path)
    except AttributeError as error:
        raise StepError(
            f"the sparse layer {path} is no longer there: a later step replaced it; make the model sparse last"
        ) from error


def _buffer(what: str, path: str) -> str:
    return f"{what}:{path.replace('.', '/')}"  # a buffer's name may hold no dot
