"""Who owns the peak of a training step's memory: every tensor's birth and death, seen as PyTorch makes them."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

OWNERS = ("parameters", "gradients", "optimizer_state", "activations", "other")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of the tensors that lived at the peak of one training step, by owner.

    Attributes:
        peak_bytes: the sum of the others, but for the allocator's.
        parameters: weights and buffers.
        gradients: of the parameters.
        optimizer_state: moments, projectors.
        activations: what the forward pass made and had not freed, recomputed blocks included.
        other: the batch, temporaries of the backward pass and of the optimizer, another network's weights.
        allocator_bytes: the most that CUDA's allocator gave out in the step; None on a CPU.
    """

    peak_bytes: int
    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    other: int
    allocator_bytes: int | None = None

    def figures(self) -> dict[str, float]:
        """name -> bytes, as a log takes them."""
        return {f"memory/{name}": value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        owners = ", ".join(f"{name.replace('_', ' ')} {getattr(self, name) / 1e6:.1f}" for name in OWNERS)
        return f"peak memory of a step {self.peak_bytes / 1e6:.1f} MB: {owners}"


class MemoryTracker(TorchDispatchMode):
    """A context that watches one training step, from zeroed gradients to the optimizer's step.

    Tensors of the device alone are counted, whole storages, each once. What a kernel takes for itself and gives back
    before it returns is not seen, nor are the parts of sharded tensors: for those, read `allocator_bytes`.

    Args:
        module: the network that is trained.
        optimizers: whose state is to be told apart.
        extra: further modules that are trained.

    Attributes:
        result: the figures, when the context has ended.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
        extra: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.result: TrainingMemory | None = None
        self._modules = (module, *extra)
        self._optimizers, self._device = optimizers, device
        self._owner: dict[int, str] = {}  # by number of the storage, given as it is first seen
        self._events: list[tuple[int, int]] = []  # (number, bytes; negative at its end)
        self._alive: dict[int, tuple[int, Any]] = {}  # address of a storage -> its number, a weak reference
        self._baseline: set[int] = set()
        self._hooks = ExitStack()

    def __enter__(self) -> MemoryTracker:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        for module in self._modules:
            for value in (*module.parameters(), *module.buffers()):
                self._see(value, "parameters", is_new=False)
            for parameter in module.parameters():
                self._see(parameter.grad, "gradients", is_new=False)
                if parameter.requires_grad:
                    # Both, as a gradient may be taken over whole or copied, and a layer-wise optimizer frees it.
                    self._hooks.callback(parameter.register_hook(self._gradient).remove)
                    hook = parameter.register_post_accumulate_grad_hook(
                        lambda item: self._gradient(item.grad)
                    )
                    self._hooks.callback(hook.remove)
        for value in self._state():
            self._see(value, "optimizer_state", is_new=False)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, traceback)
        self._hooks.close()
        if kind is None:
            for tensor in self._state():
                self._see(tensor, "optimizer_state")
            self.result = self._peak()
        self._alive.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_iter((args, kwargs)):
            self._see(value, is_new=False)
        result = func(*args, **kwargs)
        # Gradients are enabled in the forward pass and where it is computed again, and nowhere else.
        owner = "activations" if torch.is_grad_enabled() else "other"
        for value in tree_iter(result):
            self._see(value, owner, replace=False)
        return result

    def _gradient(self, gradient: Tensor | None) -> None:
        self._see(gradient, "gradients")

    def _state(self) -> Iterable[Tensor]:
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def _see(self, value: Any, owner: str = "other", *, is_new: bool = True, replace: bool = True) -> None:
        """Number a storage when it is first seen, and give it an owner.

        Args:
            is_new: it was made just now; else it was there before the step.
            replace: an owner it has gives way.
        """
        if not isinstance(value, Tensor) or value.device.type != self._device.type:
            return
        if value.layout != torch.strided or is_traceable_wrapper_subclass(value):
            return
        storage = value.untyped_storage()
        address = storage._cdata
        known = self._alive.get(address)
        if known is None:
            number = len(self._owner)
            self._owner[number] = owner
            size = storage.nbytes()
            if is_new:
                self._events.append((number, size))
            else:
                self._events.insert(len(self._baseline), (number, size))
                self._baseline.add(number)

            def end(_: Any, number: int = number, address: int = address, size: int = size) -> None:
                self._events.append((number, -size))
                self._alive.pop(address, None)

            self._alive[address] = (number, weakref.ref(storage, end))
        elif is_new and replace:
            self._owner[known[0]] = owner

    def _peak(self) -> TrainingMemory:
        """The moment with the most bytes; what was there before the step comes first in the events."""
        total = peak = moment = 0
        for index, (_, size) in enumerate(self._events):
            total += size
            if total > peak:
                peak, moment = total, index
        owned: Counter[str] = Counter()
        for number, size in self._events[: moment + 1]:
            owned[self._owner[number]] += size
        is_cuda = self._device.type == "cuda"
        allocated = torch.cuda.max_memory_allocated(self._device) if is_cuda else None
        return TrainingMemory(peak, **{name: owned[name] for name in OWNERS}, allocator_bytes=allocated)
