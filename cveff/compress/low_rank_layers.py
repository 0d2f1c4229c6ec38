"""Which layers of a network a chain can stand in for, found by running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cveff.compress.low_rank_edit import not_factorisable, replace
from cveff.runtime.errors import first_line


def find_layers(module: nn.Module, example: Tensor) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Layers that a chain can stand in for, and why the others cannot be.

    A layer counts where the network calls it exactly once and touches nothing else of it: attention that reads
    `self.qkv.weight` (BEiT, EVA), or a shared layer, is found by trying.

    Args:
        module: in evaluation mode.
        example: (1, C, H, W).

    Returns:
        path -> shape of the layer's input for `example`; path -> reason, a sentence about the layer.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    reasons: dict[str, str] = {}
    calls: dict[str, int] = {}
    candidates: dict[str, nn.Module] = {}
    weights: dict[int, list[str]] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor):
            weights.setdefault(id(weight), []).append(path)
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            reason = not_factorisable(layer) if path else "is the whole network"
            if reason:
                reasons[path] = reason
            else:
                candidates[path] = layer
    for paths in weights.values():
        for path in paths if len(paths) > 1 else ():
            if candidates.pop(path, None) is not None:
                reasons[path] = f"shares its weight with {next(other for other in paths if other != path)}"

    def note(path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            calls[path] = calls.get(path, 0) + 1
            shapes[path] = tuple(inputs[0].shape)

        return hook

    expected = run_hooked(module, example, {path: note(path) for path in candidates})
    for path in list(candidates):
        if calls.get(path, 0) != 1:
            del candidates[path]
            reasons[path] = (
                f"is called {calls[path]} times"
                if path in calls
                else "is never called: the network reads its weight, or does not use it"
            )
    for path, fault in _touched(module, example, expected, candidates).items():
        reasons[path] = (
            f"is read by the network (its weight, bias or size), not only called: wrapped, {fault}"
        )
        del candidates[path]
    return {path: shapes[path] for path in candidates}, reasons


def _touched(
    module: nn.Module, example: Tensor, expected: Tensor, candidates: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Layers that cannot be wrapped, and what happens: a `Sequential` of the layer alone computes the same and has none
    of its names."""
    fault = _fault_wrapped(module, example, expected, candidates)
    if fault is None:
        return {}
    # A network repeats few kinds of blocks; halving finds the culprits among many innocent layers.
    paths = list(candidates)
    if len(paths) == 1:
        return {paths[0]: fault}
    halves = paths[: len(paths) // 2], paths[len(paths) // 2 :]
    found: dict[str, str] = {}
    for half in halves:
        found |= _touched(module, example, expected, {path: candidates[path] for path in half})
    return found


def _fault_wrapped(
    module: nn.Module, example: Tensor, expected: Tensor, layers: Mapping[str, nn.Module]
) -> str | None:
    """What goes wrong with `layers` wrapped, None if nothing does. Unwrapped, the network has just run."""
    for path, layer in layers.items():
        replace(module, path, nn.Sequential(layer).train(layer.training))
    try:
        found = run_hooked(module, example, {})
    except (AttributeError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        for path, layer in layers.items():
            replace(module, path, layer)
    is_same = torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    return None if is_same else "it answers otherwise"


def run_hooked(module: nn.Module, images: Tensor, hooks: Mapping[str, Callable[..., None]]) -> Tensor:
    """The network's answer to `images`, without gradients, with a forward hook on each path."""
    handles = [module.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        with torch.no_grad():
            return cast(Tensor, module(images))
    finally:
        for handle in handles:
            handle.remove()
