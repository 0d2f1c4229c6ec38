"""Networks that choose by comparing (which tokens to merge) are compared with PyTorch at the file's own choices.

Two tokens can be alike but for the last bit; then the engine's rounding and PyTorch's choose differently, and both
are right. So for the comparison the file also returns what it chose, PyTorch is shown that, and the rest must agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from cveff.dynamic.token_state import Choice
from cveff.export.normalize import deployable
from cveff.export.task_outputs import Answer
from cveff.runtime.input_spec import InputSpec


class _WithChoices(nn.Module):
    """A network that returns what it chose, too, in the order of computation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []
        hooks = [part.register_forward_hook(lambda _, __, out: seen.append(out)) for part in _choices(self)]
        try:
            answer = self.network(x)
            return (*(answer if isinstance(answer, tuple) else (answer,)), *seen)
        finally:
            for hook in hooks:
                hook.remove()


def shown(shipped: Answer, input: InputSpec) -> Answer:
    """`shipped` with the network's choices as proofs; as it is where the network makes none."""
    if not _choices(shipped.network):
        return shipped
    network = _WithChoices(shipped.network)
    blank = torch.zeros(1, input.channels, *input.size)
    with torch.no_grad():
        # Choices made: a reducer may find nothing to do.
        count = len(deployable(network, input).network(blank)) - len(shipped.names)
    return replace(
        shipped, network=network, proofs=tuple(_name(index) for index in range(count)), has_choices=True
    )


@contextmanager
def as_in(found: Mapping[str, np.ndarray], network: nn.Module) -> Iterator[None]:
    """Within the block, `network`, called once, chooses what is in a file's outputs `found`, if that has choices."""
    names = itertools.takewhile(found.__contains__, map(_name, itertools.count()))
    given = [torch.from_numpy(found[name]) for name in names]
    following = iter(given)
    parts = _choices(network) if given else []
    hooks = [part.register_forward_hook(lambda _, __, ___: next(following)) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _choices(network: nn.Module) -> list[Choice]:
    return [part for part in network.modules() if isinstance(part, Choice)]


def _name(index: int) -> str:
    return f"choice_{index}"
