"""What stands in for a layer while a method is attached: it chooses, computes that much, and counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.kernels.gather_linear import some_inputs, some_outputs
from cveff.kernels.gather_mlp import gather_mlp
from cveff.sparsity.crossover import crossover
from cveff.sparsity.method import NeuronMethod
from cveff.sparsity.structure import Mlp


@dataclass
class Shared:
    """What all hooks of an attachment know.

    Attributes:
        everything: every token is sparse, by zeros.
        dense_above: a share, or None to measure.
        decoding: whether the call that runs has one token a text.
        measured: shares that were measured, by layer size and number of texts.
    """

    everything: bool
    dense_above: float | None
    decoding: bool = False
    measured: dict[tuple[object, ...], float] = field(default_factory=dict)


class SparseHook(ABC):
    """Counts what is chosen, and decides whether so much is better computed whole."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.calls = self.dense = 0
        self.chosen: float | Tensor = 0.0
        self.union: float | Tensor = 0.0

    @abstractmethod
    def installed(self) -> AbstractContextManager[None]:
        """The hook in its layer's place until the block ends."""

    def _index(self, mask: Tensor, key: tuple[object, ...], ways: Callable[[], _Ways]) -> Tensor | None:
        """Numbers that any row of the mask (N, size) chose; None if all is better computed."""
        union = mask.any(0)
        index = union.nonzero()[:, 0]
        self._count(mask, len(index) / mask.shape[1])
        above = self.shared.dense_above
        if above is None:
            place = (*key, len(mask), mask.device, torch.get_num_threads())
            if place not in self.shared.measured:
                self.shared.measured[place] = crossover(*ways(), mask.shape[1], mask.device)
            above = self.shared.measured[place]
        if len(index) > above * mask.shape[1]:
            self.dense += 1
            return None
        return index

    def _count(self, mask: Tensor, union: float) -> None:
        self.calls += 1
        self.chosen = self.chosen + mask.float().mean()
        self.union = self.union + union


_Ways = tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]
"""All of a layer, and the part of it that an index names."""


class NeuronHook(SparseHook):
    """Stands in for an MLP."""

    def __init__(
        self,
        mlp: Mlp,
        method: NeuronMethod,
        tensors: Mapping[str, Tensor],
        shared: Shared,
        before: NeuronHook | None,
    ) -> None:
        super().__init__(shared)
        self.mlp, self.method, self.tensors = mlp, method, tensors
        self.before = before if method.lookahead else None
        self.seen: Tensor | None = None
        self._original = mlp.owner.forward

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hook in the MLP's place."""
        with transposed(self.mlp.down), replaced(self.mlp.owner, self.forward):
            yield

    def forward(self, x: Tensor) -> Tensor:
        """The MLP's output for x (..., inputs)."""
        flat = x.reshape(-1, x.shape[-1])
        chosen = self._choose(flat)
        if chosen is None:
            return self._original(x)
        mask, gates = chosen
        down = self.mlp.down
        if self.shared.everything:
            self._count(mask, float(mask.any(0).float().mean()))
            return F.linear(self.mlp.values(flat) * mask, down.weight, down.bias).reshape(x.shape)
        index = self._index(mask, ("mlp", *down.weight.shape, flat.dtype), lambda: self._ways(flat))
        if index is None:
            return self._original(x)
        return self._part(flat, index, gates).reshape(x.shape)

    def _choose(self, flat: Tensor) -> tuple[Tensor, Tensor | None] | None:
        self.seen = flat if self.method.lookahead else None
        if not (self.shared.everything or self.shared.decoding) or len(flat) == 0:
            return None
        seen = flat if self.before is None or self.before.seen is None else self.before.seen
        return self.method.choose(self.tensors, self.mlp, flat, seen)

    def _part(self, flat: Tensor, index: Tensor, gates: Tensor | None) -> Tensor:
        up, up_bias = self.mlp.up
        gate, gate_bias = self.mlp.gate
        return gather_mlp(
            flat,
            index,
            up,
            self.mlp.down.weight.t(),
            gate=gate if gates is None else None,
            gated=None if gates is None else gates[:, index],
            up_bias=up_bias,
            gate_bias=gate_bias,
            down_bias=self.mlp.down.bias,
            activation=self.mlp.activation,
        )

    def _ways(self, flat: Tensor) -> _Ways:
        known = self.method.choose(self.tensors, self.mlp, flat, flat)[1]
        return lambda: self._original(flat), lambda index: self._part(flat, index, known)


class PairHook(NeuronHook):
    """Stands in for the two layers of an MLP that is no module of its own, as in OPT.

    What the first layer leaves out is 0, and stays 0 through any of the activations.
    """

    def __init__(
        self,
        mlp: Mlp,
        method: NeuronMethod,
        tensors: Mapping[str, Tensor],
        shared: Shared,
        before: NeuronHook | None,
    ) -> None:
        super().__init__(mlp, method, tensors, shared, before)
        self._first, self._last = mlp.first[0].forward, mlp.down.forward
        self._listed: Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hook in both layers' place."""
        with ExitStack() as stack:
            stack.enter_context(transposed(self.mlp.down))
            stack.enter_context(replaced(self.mlp.first[0], self.forward))
            stack.enter_context(replaced(self.mlp.down, self.last))
            yield

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activations (..., hidden) of x (..., inputs), zero where not chosen."""
        self._listed = None
        flat = x.reshape(-1, x.shape[-1])
        chosen = self._choose(flat)
        if chosen is None:
            return self._first(x)
        mask = chosen[0]
        if self.shared.everything:
            self._count(mask, float(mask.any(0).float().mean()))
            return self._first(x) * mask.reshape(*x.shape[:-1], -1)
        up, bias = self.mlp.up
        self._listed = self._index(mask, ("pair", *up.shape, flat.dtype), lambda: self._ways(flat))
        if self._listed is None:
            return self._first(x)
        found = flat.new_zeros(len(flat), self.mlp.hidden)
        found[:, self._listed] = some_outputs(flat, up, self._listed, bias)
        return found.reshape(*x.shape[:-1], -1)

    def last(self, x: Tensor) -> Tensor:
        """The output (..., inputs) of activated values (..., hidden)."""
        if self._listed is None:
            return self._last(x)
        values = x.reshape(-1, x.shape[-1])[:, self._listed]
        down = self.mlp.down
        return some_inputs(values, down.weight.t(), self._listed, down.bias).reshape(*x.shape[:-1], -1)

    def _ways(self, flat: Tensor) -> _Ways:
        down = self.mlp.down
        return lambda: F.linear(self.mlp.values(flat), down.weight, down.bias), lambda index: self._part(
            flat, index, None
        )


class InputHook(SparseHook):
    """Stands in for a linear layer that skips inputs which are nearly zero."""

    def __init__(self, layer: nn.Linear, threshold: Tensor, shared: Shared) -> None:
        super().__init__(shared)
        self.layer, self.threshold = layer, threshold
        self._original = layer.forward

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hook in the layer's place."""
        with transposed(self.layer), replaced(self.layer, self.forward):
            yield

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for x (..., inputs)."""
        if not (self.shared.everything or self.shared.decoding) or x.numel() == 0:
            return self._original(x)
        flat = x.reshape(-1, x.shape[-1])
        mask = flat.abs() > self.threshold
        if self.shared.everything:
            self._count(mask, float(mask.any(0).float().mean()))
            return self._original(x * mask.reshape(x.shape))
        index = self._index(mask, ("inputs", *self.layer.weight.shape, flat.dtype), lambda: self._ways(flat))
        return self._original(x) if index is None else self._part(flat, index).reshape(*x.shape[:-1], -1)

    def _part(self, flat: Tensor, index: Tensor) -> Tensor:
        return some_inputs(flat[:, index], self.layer.weight.t(), index, self.layer.bias)

    def _ways(self, flat: Tensor) -> _Ways:
        return lambda: self._original(flat), lambda index: self._part(flat, index)


@contextmanager
def replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Another forward for this module alone, until the block ends."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own  # type: ignore[method-assign]


@contextmanager
def transposed(layer: nn.Linear) -> Iterator[None]:
    """The same weight, input by input in memory, until the block ends."""
    strides = layer.weight.stride()
    layer.weight.data = layer.weight.data.t().contiguous().t()
    try:
        yield
    finally:
        if layer.weight.stride() != strides:
            layer.weight.data = layer.weight.data.contiguous()
