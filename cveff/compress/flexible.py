"""Sizes that a module's own calls name, corrected while its own forward runs.

`B, N, C = x.shape … x.reshape(B, N, C)` assumes that the heads together are as wide as the embedding, and
`scaled_dot_product_attention` that the width of a head is what scores are scaled by; pruning ends both. A flexible
module runs its own code, and the n-th call of a family gets the sizes (or the scale) that the edit holds for it.
Everything the edit does not name stays as the code says, so batches and image sizes remain free.

Calls on constants alone are not counted: a module that makes a table of positions once and keeps it makes fewer of
them the next time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

Named = Mapping[str, float]
"""Position in the sizes (as text), or "scale" -> value."""

FAMILIES: Mapping[Callable[..., Any], str] = {
    torch.Tensor.reshape: "reshape",
    torch.Tensor.view: "reshape",
    torch.reshape: "reshape",
    torch.Tensor.expand: "expand",
    torch.Tensor.unflatten: "unflatten",
    torch.unflatten: "unflatten",
    torch.Tensor.split: "split",
    torch.split: "split",
    torch.Tensor.chunk: "chunk",
    torch.chunk: "chunk",
    torch.nn.functional.scaled_dot_product_attention: "attention",
}
"""The calls that are counted and may be corrected."""


def family(func: Callable[..., Any], args: Sequence[Any]) -> str:
    """The family of a call; empty where it is not counted."""
    found = FAMILIES.get(func, "")
    is_cast = found == "reshape" and len(args) > 1 and isinstance(args[1], torch.dtype)
    return "" if is_cast else found


def named(kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, float]:
    """What a call of the family `kind` names itself; sizes left to be inferred (-1) are not in it."""
    if kind == "attention":
        scale = kwargs.get("scale", args[6] if len(args) > 6 else None)
        return {} if scale is None else {"scale": scale}
    if kind == "chunk":
        _, sizes, _ = _chunks(args, kwargs)
        return {str(index): size for index, size in enumerate(sizes)}
    sizes = _sizes(kind, args, kwargs)
    if sizes is None:
        return {}
    listed = [sizes] if isinstance(sizes, int) else list(sizes)
    return {str(index): int(size) for index, size in enumerate(listed) if isinstance(size, int) and size >= 0}


def call_corrected(
    func: Callable[..., Any], kind: str, args: Sequence[Any], kwargs: Mapping[str, Any], values: Named
) -> Any:
    """Make a call with `values` in place of what it names."""
    if kind == "chunk":
        tensor, sizes, dim = _chunks(args, kwargs)
        return torch.split(
            tensor, [int(values.get(str(index), size)) for index, size in enumerate(sizes)], dim
        )
    arguments, options = _corrected(kind, args, kwargs, values)
    return func(*arguments, **options)


def _corrected(
    kind: str, args: Sequence[Any], kwargs: Mapping[str, Any], values: Named
) -> tuple[list[Any], dict[str, Any]]:
    arguments, options = list(args), dict(kwargs)
    if kind == "attention":
        del arguments[6:7]
        return arguments, {**options, "scale": float(values["scale"])}
    sizes = _sizes(kind, args, kwargs)
    if isinstance(sizes, int):
        new: Any = int(values["0"])
    else:
        new = list(sizes)
        for index, value in values.items():
            new[int(index)] = int(value)
    name, position = _PLACES[kind]
    keyword = next((key for key in name if key in options), None)
    if keyword is not None:
        options[keyword] = new
    elif kind == "split" or kind == "unflatten":
        arguments[position] = new
    else:
        arguments[position:] = [tuple(new)]
    return arguments, options


def _chunks(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, list[int], int]:
    """The tensor that a chunk call cuts, the sizes of its parts, and along which dimension."""
    tensor = args[0]
    chunks = int(kwargs.get("chunks", args[1] if len(args) > 1 else 1))
    dim = int(kwargs.get("dim", args[2] if len(args) > 2 else 0))
    size = int(tensor.shape[dim])
    part = -(-size // chunks)
    return tensor, [min(part, size - start) for start in range(0, size, part)], dim


_PLACES: Mapping[str, tuple[tuple[str, ...], int]] = {
    "reshape": (("shape", "size"), 1),
    "expand": (("size",), 1),
    "split": (("split_size", "split_size_or_sections"), 1),
    "unflatten": (("sizes",), 2),
}


def _sizes(kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names, position = _PLACES[kind]
    for name in names:
        if name in kwargs:
            return kwargs[name]
    if len(args) <= position:
        return None
    first = args[position]
    if kind == "split" or isinstance(first, (list, tuple)):
        return first
    return list(args[position:])


def call_name(kind: str, numbers: Counter[str]) -> str:
    """What an edit calls the next call of a family ("reshape 2"), which is then counted.

    Families are counted apart, since exporters write fused attention out, and so make one call less.
    """
    name = f"{kind} {numbers[kind]}"
    numbers[kind] += 1
    return name


class Constants:
    """Tensors of a running module that come from no input and no weight: its buffers, tensors it keeps as attributes,
    and what is computed of those or of nothing.

    Args:
        module: about to run.
    """

    def __init__(self, module: nn.Module) -> None:
        self._known = WeakIdKeyDictionary()
        for inner in module.modules():
            self.add(list(vars(inner).values()))

    def add(self, values: Any) -> None:
        """The tensors among `values`, those in lists and dictionaries too, but no parameters."""
        for tensor in _tensors(values):
            if not isinstance(tensor, nn.Parameter):
                self._known[tensor] = True

    def only(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call takes no other tensors."""
        return all(tensor in self._known for tensor in _tensors([args, kwargs]))


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


class _Corrected(TorchFunctionMode):
    """Counts a module's calls, those of its children included, and corrects the ones that are named."""

    def __init__(self, module: nn.Module, calls: Mapping[str, Named]) -> None:
        super().__init__()
        self._calls = calls
        self._numbers: Counter[str] = Counter()
        self._constants = Constants(module)

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._constants.only(args, kwargs):
            result = func(*args, **kwargs)
            self._constants.add(result)
            return result
        kind = family(func, args)
        if kind:
            values = self._calls.get(call_name(kind, self._numbers))
            if values:
                return call_corrected(func, kind, args, kwargs, values)
        return func(*args, **kwargs)


class Flexible:
    """Mixed into a module's class by `make_flexible`."""

    flexible_calls: Mapping[str, Named]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The module's own forward, with the calls the edit names corrected."""
        with _Corrected(self, self.flexible_calls):  # type: ignore[arg-type]
            return super().forward(*arguments, **options)  # type: ignore[misc]


def make_flexible(module: nn.Module, path: str, calls: Mapping[str, Named]) -> nn.Module:
    """Correct the calls of one submodule of `module`, in place; parameters and paths stay as they were.

    Args:
        path: of the submodule; empty for `module` itself.
        calls: name of the call in its forward, "reshape 2" being the third of its family -> what it gets.
    """
    inner: Any = module.get_submodule(path)
    earlier = inner.flexible_calls if isinstance(inner, Flexible) else {}
    if not isinstance(inner, Flexible):
        kind = type(inner)
        inner.__class__ = type(f"Flexible{kind.__name__}", (Flexible, kind), {})
    # Where a network is pruned again the later sizes count; calls that only the earlier edit names keep theirs.
    names = sorted({*earlier, *calls})
    inner.flexible_calls = {name: {**earlier.get(name, {}), **calls.get(name, {})} for name in names}
    return module
