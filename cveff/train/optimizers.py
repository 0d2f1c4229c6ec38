"""Optimizers by name, with weight decay where it belongs, behind one small interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cveff.train.galore_settings import GaLore
from cveff.train.projected import ProjectedOptimizer


class ScheduledOptimizers:
    """One or more torch optimizers over disjoint parameters, with their peak learning rates.

    Args:
        optimizers: already holding their parameter groups at peak learning rate.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def set_factor(self, factor: float) -> None:
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def state_dict(self) -> dict[str, Any]:
        return {str(index): optimizer.state_dict() for index, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(index)])
            _match_memory_format(optimizer)

    def close(self) -> None:
        """Leave the parameters' gradients alone from now on: layer-wise updates hang on them."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, ProjectedOptimizer):
                optimizer.remove_hooks()


class MatrixMuon(torch.optim.Optimizer):
    """torch's Muon (Jordan et al. 2024), for convolutions too: a kernel (out, in, h, w) is the matrix (out, in·h·w).

    Muon's update is orthogonal, and orthogonality does not depend on the order of columns, so kernels in
    channels_last memory are viewed as (out, h·w·in) without a copy.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        self._kernels = list(params)
        self._matrices = [nn.Parameter(as_matrix(parameter.detach())) for parameter in self._kernels]
        self._muon = torch.optim.Muon(
            self._matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="original"
        )
        super().__init__(self._matrices, {"lr": lr})
        self.param_groups = self._muon.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.grad = None if kernel.grad is None else _as_matrix_like(kernel.grad, kernel)
        self._muon.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for kernel in self._kernels:
            kernel.grad = None

    def state_dict(self) -> dict[str, Any]:
        return self._muon.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._muon.load_state_dict(state_dict)
        self.param_groups = self._muon.param_groups

    def kernel_states(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        """Each kernel with its state, whose tensors have the shape of its matrix."""
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            yield kernel, self._muon.state.get(matrix, {})

    def set_kernel_state(self, kernel: nn.Parameter, state: dict[str, Any]) -> bool:
        """Replace a kernel's state; False where the kernel is none of this optimizer's."""
        for own, matrix in zip(self._kernels, self._matrices, strict=True):
            if own is kernel:
                self._muon.state[matrix] = state
                return True
        return False


def build_optimizer(
    module: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
    extra: nn.Module | None = None,
    galore: GaLore | None = None,
) -> ScheduledOptimizers:
    """An optimizer over all trainable parameters of `module`; weights with fewer than two dimensions do not decay.

    Args:
        extra: a module trained beside it; Muon leaves it to AdamW.
        galore: settings of "galore", whose other weights get AdamW.
        name: "sgd", "adamw", "galore" or "muon". Muon leaves the first weight, the classifier and everything below two
            dimensions to AdamW at a tenth of its learning rate.
    """
    if name == "galore":
        return ScheduledOptimizers(
            [(galore or GaLore()).optimizer(module, learning_rate, weight_decay, extra)]
        )
    matrices, vectors = _trainable(module)
    hidden = [parameter for parameter in matrices[1:-1] if parameter.ndim in (2, 4)]
    if extra is not None:
        for own, added in zip((matrices, vectors), _trainable(extra), strict=True):
            own += added
    if name == "sgd":
        groups = list(_groups(matrices, vectors, weight_decay))
        return ScheduledOptimizers(
            [torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)]
        )
    if name == "adamw":
        return ScheduledOptimizers(
            [torch.optim.AdamW(list(_groups(matrices, vectors, weight_decay)), lr=learning_rate)]
        )
    rest = [parameter for parameter in matrices if all(parameter is not other for other in hidden)]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(MatrixMuon(hidden, learning_rate, momentum, weight_decay))
    optimizers.append(torch.optim.AdamW(list(_groups(rest, vectors, weight_decay)), lr=learning_rate / 10))
    return ScheduledOptimizers(optimizers)


def _trainable(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with two or more dimensions, and the others."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [item for item in parameters if item.ndim > 1], [item for item in parameters if item.ndim <= 1]


def _groups(
    matrices: Sequence[nn.Parameter], vectors: Sequence[nn.Parameter], weight_decay: float
) -> Iterator[dict[str, Any]]:
    if matrices:
        yield {"params": list(matrices), "weight_decay": weight_decay}
    if vectors:
        yield {"params": list(vectors), "weight_decay": 0.0}


def as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """A kernel (out, in, h, w) as the matrix that Muon sees, a view; a matrix as it is."""
    if kernel.ndim == 2:
        return kernel
    if not kernel.is_contiguous():
        kernel = kernel.permute(0, 2, 3, 1)
    return kernel.view(kernel.shape[0], -1)


def _as_matrix_like(gradient: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The gradient with its columns in the order `as_matrix(kernel)` has."""
    if gradient.ndim > 2 and not kernel.is_contiguous():
        gradient = gradient.permute(0, 2, 3, 1)
    return gradient.reshape(gradient.shape[0], -1)


def _match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments the strides of their parameters: other strides round differently, and a resumed run
    must equal an uninterrupted one bit for bit."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
