"""What GaLore's optimizers share: projection, refresh, update, layer-wise hooks, ranks that agree, checked state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cveff.errors import TrainingError
from cveff.train import state8bit
from cveff.train.projection_checks import check_group, check_state, sides_in
from cveff.train.projector import Side, find_bases, overlap, project, project_back, turn
from cveff.train.sharded import cut_like

LAZY_OVERLAP = 0.4
LAZY_REFRESHES = 5
RESIDUAL_GROWTH = 1.01


class ProjectedOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer of moments in low-rank bases; a subclass says what the moments are.

    Attributes:
        moments: name -> power of the gradient it averages, of every state tensor that lives in the basis.
    """

    moments: ClassVar[Mapping[str, int]]

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], *, layerwise: bool, synchronize: bool
    ) -> None:
        self._layerwise, self._synchronize = layerwise, synchronize
        self._arrived: set[nn.Parameter] = set()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        if layerwise and _num_ranks() > 1:
            raise TrainingError(
                "layerwise updates come before gradients are averaged over processes; use one process, or "
                "layerwise=False"
            )
        super().__init__(params, defaults)

    @abstractmethod
    def direction(
        self, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None, float]:
        """Take `gradient` (of the parameter, or projected) into the state.

        Returns:
            numerator, denominator (None: 1) and divisor: the step is -lr · numerator / denominator / divisor.
        """

    def prepare(self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Weight decay before the update; the gradient to use."""
        return gradient

    def finish(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        """Weight decay after the update."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for what it may hold.

        Raises:
            TrainingError: a value out of range, or a parameter that cannot be projected.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self._name)
        except TrainingError:
            self.param_groups.pop()
            raise
        if self._layerwise:
            hook = self._hook(len(self.param_groups) - 1)
            self._hooks += [
                parameter.register_post_accumulate_grad_hook(hook) for parameter in group["params"]
            ]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; under `layerwise` that has already happened.

        Raises:
            TrainingError: a gradient that a basis is to be taken from is not finite, or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._arrived.clear()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in the dtypes it has.

        Raises:
            CheckpointError: a tensor does not fit its parameter and rank.
        """
        super().load_state_dict(state_dict)
        # torch casts floating state to the parameter's dtype, codes of 8 bits included.
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter)
                if state:
                    check_state(state, parameter, group, self.moments, self._name)

    def remove_hooks(self) -> None:
        """End layer-wise updates: later gradients stay where they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        """By the group's index: loading a state replaces the groups."""

        @torch.no_grad()
        def update(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)
            if parameter in self._arrived:
                raise TrainingError(
                    "layerwise updates and accumulated gradients exclude each other: a second gradient of "
                    f"{self._name(parameter)} arrived before step(); use layerwise=False"
                )
            self._arrived.add(parameter)
            self._update(parameter, self.param_groups[index])
            parameter.grad = None

        return update

    def _update(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise TrainingError(
                f"the gradient of {self._name(parameter)} is sparse; use sparse=False in its embedding"
            )
        if gradient.dtype == torch.float16:
            gradient = gradient.float()  # squares of small gradients are zero in float16
        state = self.state[parameter]
        state.setdefault("step", 0)
        gradient = self.prepare(parameter, gradient, group)
        sides = sides_in(parameter, group)
        if sides:
            self._update_projected(parameter, gradient, sides, state, group)
        else:
            state["step"] += 1
            if hasattr(gradient, "full_tensor"):
                group = {**group, "state_bits": 32}  # a shard's codes would not say which part they are
            numerator, denominator, divisor = self.direction(gradient, state, group)
            factor = -group["lr"] * (1.0 if group["rank"] is None else group["scale"]) / divisor
            if denominator is None:
                parameter.add_(numerator, alpha=factor)
            else:
                parameter.addcdiv_(numerator, denominator, value=factor)
        self.finish(parameter, group)

    def _update_projected(
        self,
        parameter: nn.Parameter,
        gradient: Tensor,
        sides: tuple[Side, ...],
        state: dict[str, Any],
        group: Mapping[str, Any],
    ) -> None:
        # A sharded gradient is gathered: singular vectors are those of the whole matrix.
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        matrix = whole.reshape(whole.shape[0], -1)
        bases = self._bases(parameter, matrix, sides, state, group)
        state["step"] += 1
        low = project(matrix, bases)
        numerator, denominator, divisor = self.direction(low, state, group)
        normalised = (numerator if denominator is None else numerator / denominator).to(matrix.dtype)
        update = project_back(normalised, bases)
        if group["residual"]:
            update += _residual(matrix, low, normalised, bases, state)
        factor = -group["lr"] * group["scale"] / divisor
        parameter.add_(cut_like(update.reshape(whole.shape), parameter), alpha=factor)

    def _bases(
        self,
        parameter: nn.Parameter,
        matrix: Tensor,
        sides: tuple[Side, ...],
        state: dict[str, Any],
        group: Mapping[str, Any],
    ) -> dict[Side, Tensor]:
        """The bases in use, taken anew from `matrix` when a refresh is due."""
        old = {side: state[side] for side in sides if side in state}
        if old and state["step"] % state.get("gap", group["update_proj_gap"]):
            return old
        if not bool(torch.isfinite(matrix).all()):
            raise TrainingError(
                f"the gradient of {self._name(parameter)} is not finite at step {state['step']}, where its subspace is "
                "to be found; lower the learning rate, or clip gradients"
            )
        new = find_bases(matrix, group["rank"], sides, group["projector"], old, seed=state["step"])
        for basis in new.values():
            self._agree(basis)
        if old and group["carry"] == "rotate":
            self._rotate(matrix, old, new, state, group)
        if old and group["refresh"] == "lazy":
            kept = overlap(old, new)
            self._agree(kept)  # else ranks could refresh at different steps, and wait for each other
            stable = state.get("stable", 0) + 1 if float(kept) >= LAZY_OVERLAP else 0
            gap = state.get("gap", group["update_proj_gap"])
            state["gap"], state["stable"] = (2 * gap, 0) if stable == LAZY_REFRESHES else (gap, stable)
        for side, basis in new.items():
            state[side] = basis
        return new

    def _rotate(
        self,
        matrix: Tensor,
        old: Mapping[Side, Tensor],
        new: Mapping[Side, Tensor],
        state: dict[str, Any],
        group: Mapping[str, Any],
    ) -> None:
        like = project(matrix, old)
        for name, power in self.moments.items():
            if name not in state:
                continue
            moment = state8bit.read(state, name, like, group["state_bits"])
            turned = moment
            for side in new:
                angle = turn(old, new, side).to(moment.dtype) ** power
                turned = angle @ turned if side == "left" else turned @ angle
            state8bit.write(state, name, moment.copy_(turned))

    def _agree(self, value: Tensor) -> None:
        if self._synchronize and _num_ranks() > 1:
            torch.distributed.broadcast(value, src=0)

    def _name(self, parameter: Tensor) -> str:
        """How an error calls a parameter: its name where the groups know it, else its shape."""
        for group in self.param_groups:
            names = group.get("param_names") or [None] * len(group["params"])
            for name, other in zip(names, group["params"], strict=True):
                if other is parameter and name is not None:
                    return str(name)
        return f"a parameter of shape {tuple(parameter.shape)}"


def _residual(
    matrix: Tensor, low: Tensor, normalised: Tensor, bases: Mapping[Side, Tensor], state: dict[str, Any]
) -> Tensor:
    """Fira: G - U R or G - R V, each lane scaled by ‖N‖ / ‖R‖, its norm growing by 1% a step at most; (m, n)."""
    # One ratio for each row or column of the side that is whole, or for all where both sides are projected.
    along = (0, 1) if len(bases) == 2 else 0 if "left" in bases else 1
    ratio = normalised.norm(dim=along, keepdim=True) / (low.norm(dim=along, keepdim=True) + 1e-8)
    left_out = (matrix - project_back(low, bases)) * ratio
    norm = left_out.norm().float()
    if "residual_norm" in state:
        before = state["residual_norm"]
        shrink = (RESIDUAL_GROWTH * before / norm.clamp_min(1e-30)).clamp_max(1.0)
        shrink = torch.where(before > 0, shrink, 1.0)  # from nothing any growth is too much
        left_out *= shrink.to(left_out.dtype)
        norm = norm * shrink
    state["residual_norm"] = norm
    return left_out


def _num_ranks() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
