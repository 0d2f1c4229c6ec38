"""Which linear layers get weights of few bits, and which have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.compress.quant.packed_linear import PackedLinear
from cveff.compress.quant.weight_edit import not_packable
from cveff.errors import StepError

MIN_WEIGHTS = 128 * 128
"""Layers with fewer weights are left alone: they are a small part of any file and of any time."""


def choose(
    module: nn.Module, *, exclude: Sequence[str] = (), min_weights: int = MIN_WEIGHTS
) -> tuple[list[str], dict[str, str]]:
    """Layers to round, by the rule that `WeightOnly` states, and why the other linear layers are left alone.

    Raises:
        StepError: the network is quantized already, nothing is left to round, or `exclude` names no module.
    """
    if is_packed(module) or any(isinstance(part, FakeQuantize) for part in module.modules()):
        raise StepError(f"{type(module).__name__} is quantized already; start from the float network")
    parts = dict(module.named_modules(remove_duplicate=False))
    if unknown := [path for path in exclude if path not in parts]:
        raise StepError(f"exclude names {', '.join(map(repr, unknown))}, which the network does not have")
    shared: dict[int, list[str]] = {}
    for path, part in parts.items():
        weight = part._parameters.get("weight")
        if weight is not None:
            shared.setdefault(id(weight), []).append(path)
    heads = _heads(module)
    chosen, skipped = [], {}
    for path, part in parts.items():
        if not isinstance(part, nn.Linear):
            continue
        others = [other for other in shared.get(id(part._parameters.get("weight")), []) if other != path]
        reason = not_packable(part)
        if not path:
            reason = "is the whole network"
        elif any(path == name or path.startswith(f"{name}.") for name in exclude):
            reason = "is excluded"
        elif part in heads:
            reason = "is the output head"
        elif not reason and others:
            reason = f"shares its weight with {others[0]}"
        elif not reason and part.weight.numel() < min_weights:
            reason = f"has {part.weight.numel()} weights, fewer than {min_weights}"
        if reason:
            skipped[path] = reason
        else:
            chosen.append(path)
    if not chosen:
        raise StepError(nothing(skipped))
    return chosen, skipped


def packed_layers(module: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """Path and layer of everything that keeps its weight as integers."""
    for path, part in module.named_modules():
        if isinstance(part, PackedLinear):
            yield path, part


def is_packed(module: nn.Module) -> bool:
    """Whether some layer keeps its weight as integers already."""
    return next(packed_layers(module), None) is not None


def _heads(module: nn.Module) -> Sequence[nn.Module]:
    for name in ("get_output_embeddings", "get_classifier"):
        ask: Callable[[], Any] | None = getattr(module, name, None)
        if callable(ask):
            found = ask()
            parts = found if isinstance(found, (tuple, list)) else [found]
            return [part for part in parts if isinstance(part, nn.Module)]
    return [part for part in module.modules() if isinstance(part, nn.Linear)][-1:]


def nothing(skipped: Mapping[str, str]) -> str:
    """Why no layer is left, a sentence."""
    if not skipped:
        return "the network has no linear layer to quantize"
    some = "; ".join(f"{path} {reason}" for path, reason in list(skipped.items())[:3])
    return f"none of the {len(skipped)} linear layers can be quantized: {some}"
