"""What reaches a network's layers while it is changed from front to back, without computing the front again and again.

A module whose layers are all done returns, at every later pass, what it returned once: so the whole walk costs a few
passes, whatever the network's depth. Which module feeds which stays the business of the network's own code; nothing is
assumed of it but that modules called once a pass have no effect besides what they return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from cveff.compress.samples import evaluation
from cveff.errors import StepError

Batch = Tensor | Mapping[str, Any] | Sequence[Any]
"""What a network is called with: one argument, keyword arguments, or positional ones."""

MEMORY = 2 << 30
"""Bytes of outputs kept; past it modules are computed again at every pass, which is slower and gives the same."""


class Replay:
    """Passes over calibration batches, each up to the layers asked for.

    The network is in evaluation mode during passes and computes without gradients.

    Args:
        module: the network; its layers may be replaced between passes, at the same paths.
        batches: at least one.
        paths: layers that will be asked for.
        memory: bytes of outputs kept.

    Attributes:
        stages: the layers that are called, in the order of their first call; those that get the same tensor together.
        unused: the others.

    Raises:
        StepError: there is no batch.
    """

    def __init__(
        self, module: nn.Module, batches: Sequence[Batch], paths: Sequence[str], *, memory: int = MEMORY
    ) -> None:
        if not batches:
            raise StepError("there are no calibration batches; give at least one")
        self._module, self._batches, self._memory = module, batches, memory
        self._layers: dict[str, list[str]] = {}
        for path in paths:
            parts = path.split(".")
            for depth in range(1, len(parts)):
                self._layers.setdefault(".".join(parts[:depth]), []).append(path)
        self._kept: dict[str, list[Any]] = {}
        self._bytes: dict[str, int] = {}
        self._done: set[str] = set()
        self.stages: list[tuple[str, ...]] = []
        self._survey(paths)
        self.unused = [path for path in paths if path not in self._calls]
        self._done.update(self.unused)

    def inputs(self, stage: Sequence[str], take: Callable[[str, Tensor], None]) -> None:
        """Call `take(path, x)` for what each layer of `stage` is called with, batch by batch."""
        ready = [path for path in self._once if self._done.issuperset(self._layers[path])]
        found: dict[str, list[Any]] = {path: [] for path in _outermost(ready) if path not in self._kept}
        for index, batch in enumerate(self._batches):
            left = sum(self._calls[path] for path in stage)

            def look(path: str) -> Callable[..., None]:
                def hook(layer: nn.Module, given: tuple[Any, ...]) -> None:
                    nonlocal left
                    take(path, given[0])
                    left -= 1
                    if not left:
                        raise _Seen

                return hook

            def keep(path: str) -> Callable[..., None]:
                def hook(part: nn.Module, given: Any, output: Any) -> None:
                    found[path].append(_copy(output))

                return hook

            before = {path: look(path) for path in stage}
            with self._returning(index), suppress(_Seen):
                self._run(batch, before, {path: keep(path) for path in found})
        for path, outputs in found.items():
            self._keep(path, outputs)

    def done(self, stage: Sequence[str]) -> None:
        """Say that the layers of `stage` will not change any more."""
        self._done.update(stage)

    def _survey(self, paths: Sequence[str]) -> None:
        """One pass that finds the order of calls, and which modules are called once."""
        self._calls: dict[str, int] = {}
        times: dict[str, int] = {}
        last: tuple[Any, int] = (None, 0)

        def look(path: str) -> Callable[..., None]:
            def hook(layer: nn.Module, given: tuple[Any, ...]) -> None:
                nonlocal last
                is_first = path not in self._calls
                self._calls[path] = self._calls.get(path, 0) + 1
                # The tensor itself is held, or another one could get its place in memory.
                seen = (given[0], given[0]._version)
                if is_first and last[0] is seen[0] and last[1] == seen[1]:
                    self.stages[-1] += (path,)
                elif is_first:
                    self.stages.append((path,))
                last = seen

            return hook

        def count(path: str) -> Callable[..., None]:
            def hook(part: nn.Module, given: Any) -> None:
                times[path] = times.get(path, 0) + 1

            return hook

        hooks = {path: count(path) for path in self._layers} | {path: look(path) for path in paths}
        self._run(self._batches[0], hooks, {})
        self._once = [path for path in self._layers if times.get(path) == 1]

    def _run(
        self,
        batch: Batch,
        before: Mapping[str, Callable[..., None]],
        after: Mapping[str, Callable[..., None]],
    ) -> None:
        part = self._module.get_submodule
        handles = [part(path).register_forward_pre_hook(hook) for path, hook in before.items()]
        handles += [part(path).register_forward_hook(hook) for path, hook in after.items()]
        try:
            with evaluation(self._module), torch.no_grad():
                call(self._module, batch)
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _returning(self, index: int) -> Iterator[None]:
        """Modules return what they are known to return for batch `index`."""
        parts = {path: self._module.get_submodule(path) for path in self._kept}
        own = {path: part.__dict__.get("forward") for path, part in parts.items()}
        for path, part in parts.items():
            # A copy, or code that works in place would change what the next pass gets.
            output = self._kept[path][index]
            part.__dict__["forward"] = lambda *_, _output=output, **__: _copy(_output)
        try:
            yield
        finally:
            for path, part in parts.items():
                del part.__dict__["forward"]
                if own[path] is not None:
                    part.__dict__["forward"] = own[path]

    def _keep(self, path: str, outputs: list[Any]) -> None:
        size = sum(leaf.nbytes for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
        inner = [other for other in self._kept if other.startswith(f"{path}.")]
        held = sum(size for other, size in self._bytes.items() if other not in inner)
        # A pass that stopped early may not have called it.
        if len(outputs) < len(self._batches) or held + size > self._memory:
            return
        for other in inner:
            del self._kept[other], self._bytes[other]
        self._kept[path], self._bytes[path] = outputs, size


def call(module: nn.Module, batch: Batch) -> Any:
    """What `module` returns for a batch."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(batch) if isinstance(batch, Tensor) else module(*batch)


def _outermost(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


class _Seen(Exception):  # noqa: N818
    """All layers asked for were called; nothing after them is needed."""


def _copy(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)
