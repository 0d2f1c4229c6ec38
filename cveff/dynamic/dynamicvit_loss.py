"""What DynamicViT adds to a training's loss (Rao et al., arXiv:2106.02034, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cveff.dynamic.dynamicvit import KeepPredicted
from cveff.errors import StepError
from cveff.train.objective import Objective


class RatioObjective:
    """An objective, plus `weight` times the squared error of the shares of tokens kept (equation 13).

    Args:
        weight: the paper's 2.
    """

    def __init__(self, objective: Objective, weight: float) -> None:
        self._objective, self._weight = objective, weight
        self.extra = objective.extra

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The other objective's loss and this one's share, summed over the images."""
        with _outputs(_predictors(module)) as seen:
            loss = self._objective.loss(module, images, targets)
        return loss + self._weight * ratio_error(_predictors(module), [tokens.mask for tokens in seen])

    def after_step(self, module: nn.Module, step: int, total_steps: int) -> None:
        """The other objective's."""
        self._objective.after_step(module, step, total_steps)

    def identity(self) -> Mapping[str, Any]:
        """The other objective's, and the weight."""
        return {**self._objective.identity(), "token_ratio": self._weight}


class TokenImitation:
    """An objective with a teacher, plus `weight` times kept tokens' squared error against its tokens (equation 11).

    Tokens are compared as the final norm gives them.

    Args:
        teacher: the network the objective calls, whose tokens are those of the dense parent.
        weight: the paper's 0.5.
    """

    def __init__(self, objective: Objective, teacher: nn.Module, weight: float) -> None:
        self._objective, self._teacher, self._weight = objective, teacher, weight
        self.extra = objective.extra

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The other objective's loss and this one's share, summed over the images.

        Raises:
            StepError: the teacher's tokens are others.
        """
        with (
            _outputs(_predictors(module)) as kept,
            _outputs([module.get_submodule("norm")]) as own,
            _outputs([_norm(self._teacher)]) as others,
        ):
            loss = self._objective.loss(module, images, targets)
        if not others or own[-1].shape != others[-1].shape:
            raise StepError(
                "the teacher's tokens are not the network's, so they cannot be imitated; take the dense network as the "
                "teacher, or set reduce_tokens.token_weight to 0"
            )
        return loss + self._weight * token_error(own[-1], others[-1], kept[-1].mask)

    def after_step(self, module: nn.Module, step: int, total_steps: int) -> None:
        """The other objective's."""
        self._objective.after_step(module, step, total_steps)

    def identity(self) -> Mapping[str, Any]:
        """The other objective's, and the weight."""
        return {**self._objective.identity(), "token_imitation": self._weight}


def ratio_error(predictors: Sequence[KeepPredicted], masks: Sequence[Tensor]) -> Tensor:
    """`Σ_images mean_predictors (ratio - kept share)²` for masks (B, n) in the order of the predictors."""
    errors = [
        (mask.mean(dim=1) - predictor.ratio).square().sum()
        for predictor, mask in zip(predictors, masks, strict=True)
    ]
    return torch.stack(errors).mean()


def token_error(own: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """B times the mean squared difference of the kept patch tokens of `own` and `other` (B, N, C), by `mask` (B, n)."""
    count = mask.shape[1]
    squares = (own[:, -count:].float() - other[:, -count:].float()).square().mean(dim=-1)
    return len(own) * (mask * squares).sum() / mask.sum().clamp_min(1)


def _predictors(module: nn.Module) -> list[KeepPredicted]:
    return [part for part in module.modules() if isinstance(part, KeepPredicted)]


def _norm(teacher: nn.Module) -> nn.Module:
    norm = getattr(teacher, "norm", None)
    return norm if isinstance(norm, nn.Module) else nn.Module()


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What `modules` return while the block runs, in order."""
    seen: list[Any] = []
    hooks = [part.register_forward_hook(lambda _, __, output: seen.append(output)) for part in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
