"""Which of a module's calls names sizes that pruning changes, found by watching it run.

Every call a module makes is matched with the operator of the exported graph it became, whose size after pruning is
known. What the pruned network's code then asks for instead is a correction that the edit has to hold
(`flexible.py`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cveff.compress.flexible import Constants, call_corrected, call_name, family, named
from cveff.compress.operators import operator_name
from cveff.compress.trace import Trace

Corrections = Mapping[str, Mapping[str, frozenset[str]]]
"""Path of a module -> name of a call -> what has to be corrected in it."""

_NODES: Mapping[str, frozenset[str]] = {
    "reshape": frozenset(["reshape", "view"]),
    "expand": frozenset(["expand"]),
    "unflatten": frozenset(["unflatten"]),
    "split": frozenset(["split", "split_with_sizes"]),
    "chunk": frozenset(["chunk"]),
    "attention": frozenset(["scaled_dot_product_attention"]),
}
_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Seen:
    """A call: the innermost module that made it, its name there, its family and its result's shapes."""

    path: str
    name: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class OwnCalls:
    """Calls of a network's modules, and the nodes they became.

    Attributes:
        nodes: (path, name of the call) -> the node, one for each time the module runs.
        trace: the graph.
    """

    trace: Trace
    nodes: Mapping[tuple[str, str], tuple[torch.fx.Node, ...]]

    def expected(self, path: str, call: str, shapes: _Shapes) -> dict[str, float]:
        """What a call has to name once values have `shapes`; nothing where that is not known or not one answer.

        Args:
            shapes: node name -> shape after pruning.
        """
        answers = [_expected(self.trace, node, shapes) for node in self.nodes.get((path, call), ())]
        return answers[0] if answers and all(answer == answers[0] for answer in answers) else {}

    def corrections(self, found: Corrections, shapes: _Shapes) -> dict[str, dict[str, dict[str, float]]]:
        """The edit's corrections: path -> name of the call -> position or "scale" -> value."""
        result: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        for path, calls in found.items():
            for call, keys in calls.items():
                expected = self.expected(path, call, shapes)
                values = {key: expected[key] for key in sorted(keys) if key in expected}
                if values:
                    result[path][call] = values
        return dict(result)

    def watch(
        self, module: nn.Module, images: torch.Tensor, shapes: _Shapes
    ) -> tuple[Any, dict[str, dict[str, frozenset[str]]]]:
        """Run a pruned network and correct its calls as it goes.

        Args:
            module: the pruned network.
            images: one image, (1, C, H, W) float.
            shapes: node name -> shape that its value has to have.

        Returns:
            the network's output, and what had to be corrected; (the exception, …) where it does not run.
        """
        found: dict[str, dict[str, frozenset[str]]] = defaultdict(dict)

        def correct(
            path: str, call: str, kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]
        ) -> Mapping[str, float]:
            expected = self.expected(path, call, shapes)
            asked = named(kind, args, kwargs)
            if kind == "attention":
                wrong = expected if not asked else {}
            else:
                wrong = {key: expected[key] for key, size in asked.items() if size != expected.get(key, size)}
            if wrong and kind in ("split", "chunk"):
                wrong = expected  # the parts add up, so one that is right by chance is held as well
            if wrong:
                found[path][call] = frozenset(wrong)
            return wrong

        try:
            with torch.no_grad(), _watching(module, correct):
                return module(images), dict(found)
        except Exception as error:  # noqa: BLE001 - whatever the network's own code raises on the new sizes
            return error, dict(found)


def own_calls(module: nn.Module, trace: Trace, images: torch.Tensor) -> OwnCalls:
    """Match the calls of a network's modules with the nodes they became.

    Args:
        module: the traced network, or a copy; it gets hooks and loses them again.
        images: one image, (1, C, H, W) float.
    """
    seen: dict[str, list[_Seen]] = defaultdict(list)

    def note(path: str, call: str, kind: str, result: Any) -> None:
        parts = result if isinstance(result, (tuple, list)) else (result,)
        seen[path].append(_Seen(path, call, kind, tuple(tuple(part.shape) for part in parts)))

    with torch.no_grad(), _watching(module, after=note):
        module(images)
    nodes: dict[str, list[tuple[torch.fx.Node, str]]] = defaultdict(list)
    for node in trace.nodes:
        kind = next((kind for kind, names in _NODES.items() if operator_name(node) in names), "")
        if node.op == "call_function" and kind:
            nodes[trace.modules[node.name]].append((node, kind))
    matched: dict[tuple[str, str], tuple[torch.fx.Node, ...]] = defaultdict(tuple)
    for path, calls in seen.items():
        for call, node in _common(calls, nodes.get(path, []), trace):
            matched[(path, call.name)] += (node,)
    return OwnCalls(trace, dict(matched))


def merged(first: Corrections, second: Corrections) -> dict[str, dict[str, frozenset[str]]]:
    """Both corrections together."""
    result = {path: dict(calls) for path, calls in first.items()}
    for path, calls in second.items():
        known = result.setdefault(path, {})
        for call, keys in calls.items():
            known[call] = known.get(call, frozenset()) | keys
    return result


def _shapes_of(trace: Trace, node: torch.fx.Node) -> tuple[tuple[int, ...], ...]:
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(tuple(int(size) for size in part.shape) for part in parts)


def _common(
    calls: Sequence[_Seen], nodes: Sequence[tuple[torch.fx.Node, str]], trace: Trace
) -> Iterator[tuple[_Seen, torch.fx.Node]]:
    """The longest common subsequence: calls may have been optimised away, and operators come from elsewhere."""
    left = [(call.kind, call.shapes) for call in calls]
    right = [(kind, _shapes_of(trace, node)) for node, kind in nodes]
    best = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i in reversed(range(len(left))):
        for j in reversed(range(len(right))):
            best[i][j] = (
                best[i + 1][j + 1] + 1 if left[i] == right[j] else max(best[i + 1][j], best[i][j + 1])
            )
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] == right[j]:
            yield calls[i], nodes[j][0]
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1


def _expected(trace: Trace, node: torch.fx.Node, shapes: _Shapes) -> dict[str, float]:
    name = operator_name(node)
    if name == "scaled_dot_product_attention":
        query: Any = node.args[0]
        before, after = trace.shapes[query.name][-1], shapes[query.name][-1]
        return {"scale": before**-0.5} if before != after and node.kwargs.get("scale") is None else {}
    if name in ("split", "split_with_sizes", "chunk"):
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        parts = {int(user.args[1]): shapes[user.name][int(dim)] for user in node.users}  # type: ignore[arg-type]
        if name == "chunk" and len(parts) < len(node.meta["val"]):
            return {}  # a part that nobody reads has a size all the same
        if name == "chunk" or isinstance(node.args[1], (list, tuple)):
            return {str(index): size for index, size in sorted(parts.items())}
        return {"0": parts[0]} if 0 in parts else {}
    if name == "unflatten":
        dim, sizes = int(node.args[1]), node.args[2]  # type: ignore[arg-type]
        dim %= len(trace.shapes[node.name]) - len(sizes) + 1  # type: ignore[arg-type]
        return {str(index): shapes[node.name][dim + index] for index in range(len(sizes))}  # type: ignore[arg-type]
    return {str(index): size for index, size in enumerate(shapes[node.name])}


_Before = Callable[[str, str, str, Sequence[Any], Mapping[str, Any]], Mapping[str, float]]
_After = Callable[[str, str, str, Any], None]


@dataclass(eq=False)
class _Frame:
    """A running module and how many calls it has made."""

    path: str
    constants: Constants
    numbers: Counter[str] = field(default_factory=Counter)


class _Watching(TorchFunctionMode):
    def __init__(self, running: list[_Frame], before: _Before | None, after: _After | None) -> None:
        super().__init__()
        self._running, self._before, self._after = running, before, after

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        kind = family(func, args)
        counting = [frame for frame in self._running if not frame.constants.only(args, kwargs)]
        if not kind or not counting or counting[-1] is not self._running[-1]:
            result = func(*args, **kwargs)
            for frame in self._running:
                if frame not in counting:
                    frame.constants.add(result)
            return result
        # A module's calls are counted with its children's.
        path, call = [(frame.path, call_name(kind, frame.numbers)) for frame in counting][-1]
        values = self._before(path, call, kind, args, kwargs) if self._before is not None else {}
        result = call_corrected(func, kind, args, kwargs, values) if values else func(*args, **kwargs)
        if self._after is not None:
            self._after(path, call, kind, result)
        return result


@contextmanager
def _watching(
    module: nn.Module, before: _Before | None = None, after: _After | None = None
) -> Iterator[None]:
    running: list[_Frame] = []  # the innermost last
    handles = []
    for path, inner in module.named_modules():

        def enter(inner: nn.Module, __: Any, path: str = path) -> None:
            running.append(_Frame(path, Constants(inner)))

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            running.pop()

        handles += [inner.register_forward_pre_hook(enter), inner.register_forward_hook(leave)]
    try:
        with _Watching(running, before, after):
            yield
    finally:
        for handle in handles:
            handle.remove()
