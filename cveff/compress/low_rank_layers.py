"""Which layers of a network a chain can stand in for, found by running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cveff.compress.low_rank_edit import not_factorisable, replace


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
    for path in _touched(module, example, expected, candidates):
        reasons[path] = "is read by the network (its weight, bias or size), not only called"
        del candidates[path]
    return {path: shapes[path] for path in candidates}, reasons


def _touched(
    module: nn.Module, example: Tensor, expected: Tensor, candidates: Mapping[str, nn.Module]
) -> list[str]:
    """Layers that cannot be wrapped: a `Sequential` of the layer alone computes the same and has none of its names."""
    if _runs_wrapped(module, example, expected, candidates):
        return []
    # A network repeats few kinds of blocks; halving finds the culprits among many innocent layers.
    paths = list(candidates)
    if len(paths) == 1:
        return paths
    halves = paths[: len(paths) // 2], paths[len(paths) // 2 :]
    return [
        path
        for half in halves
        for path in _touched(module, example, expected, {path: candidates[path] for path in half})
    ]


def _runs_wrapped(
    module: nn.Module, example: Tensor, expected: Tensor, layers: Mapping[str, nn.Module]
) -> bool:
    for path, layer in layers.items():
        replace(module, path, nn.Sequential(layer).train(layer.training))
    try:
        found = run_hooked(module, example, {})
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    except (AttributeError, TypeError, NotImplementedError):
        return False  # the network reads something off the layer that its wrapper does not have
    finally:
        for path, layer in layers.items():
            replace(module, path, layer)


def run_hooked(module: nn.Module, images: Tensor, hooks: Mapping[str, Callable[..., None]]) -> Tensor:
    """The network's answer to `images`, without gradients, with a forward hook on each path."""
    handles = [module.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        with torch.no_grad():
            return cast(Tensor, module(images))
    finally:
        for handle in handles:
            handle.remove()
