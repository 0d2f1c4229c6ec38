"""Quantization-aware training: whatever trains a rounded network also learns its steps.

The network computes with rounded weights and activations and passes gradients straight through (Jacob et al., CVPR
2018); steps get the gradients of LSQ+ (Bhalgat et al., CVPR-W 2020). Optimizers that divide a gradient by its size, as
Adam does, would move a step of 0.01 and one of 1 equally far, so what is trained is the scale's logarithm. Batch norms
are folded already, with the statistics that were trained: what is simulated is what is exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.train.objective import Objective

FROZEN = 0.2
"""Share of all steps, the last, in which weights settle to steps that no longer move."""


class RoundingAware:
    """An objective that also trains the steps of a rounded network.

    Args:
        inner: what is minimised.
        module: the network.
    """

    def __init__(self, inner: Objective, module: nn.Module) -> None:
        self._inner, self._module = inner, module
        moves: list[nn.Parameter] = []
        for part in _roundings(module):
            if not part.grid.float8:  # its values are as precise relative to any step
                count = 1 if part.grid.symmetric else 2
                part.moves = tuple(nn.Parameter(torch.zeros_like(part.scale)) for _ in range(count))
                moves.extend(part.moves)  # type: ignore[arg-type]
        self._moves = _Moves(moves)
        parts = {"moves": self._moves, **({} if inner.extra is None else {"inner": inner.extra})}
        self.extra: nn.Module | None = nn.ModuleDict(parts)

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The inner objective's."""
        self._moves.obey()
        return self._inner.loss(module, images, targets)

    def after_step(self, module: nn.Module, step: int, total_steps: int) -> None:
        """Take what the steps moved into them; stop that near the end."""
        self._inner.after_step(module, step, total_steps)
        for part in _roundings(module):
            part.settle()
        if step >= (1 - FROZEN) * total_steps:
            self._moves.frozen.fill_(True)
        if step >= total_steps:
            for part in _roundings(module):
                part.moves = None

    def identity(self) -> Mapping[str, Any]:
        """The inner objective's."""
        return {**self._inner.identity(), "rounding": "learned steps"}


class _Moves(nn.Module):
    """What moves, and whether it still may: a run that is resumed must know."""

    frozen: Tensor

    def __init__(self, values: list[nn.Parameter]) -> None:
        super().__init__()
        self.values = nn.ParameterList(values)
        self.register_buffer("frozen", torch.tensor(False))

    def obey(self) -> None:
        if bool(self.frozen):
            self.requires_grad_(False)


def _roundings(module: nn.Module) -> list[FakeQuantize]:
    return [part for part in module.modules() if isinstance(part, FakeQuantize)]
