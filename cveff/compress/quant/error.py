"""How far a rounded network is from the unrounded one, as a whole and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from cveff.compress.quant.layers import Observe
from cveff.compress.quant.ranges import rounding_off


@torch.no_grad()
def logits(graph: fx.GraphModule, batches: Sequence[Tensor]) -> Tensor:
    """(images, classes)."""
    return torch.cat([graph(images) for images in batches])


@torch.no_grad()
def float_logits(graph: fx.GraphModule, batches: Sequence[Tensor]) -> Tensor:
    """The same with every rounding off; weights that were put on their grid stay there."""
    with rounding_off(graph):
        return logits(graph, batches)


def relative_error(rounded: Tensor, exact: Tensor) -> float:
    """Energy of the difference over the energy of what differs between classes, of logits (images, classes)."""
    centred = exact - exact.mean(1, keepdim=True)
    difference = rounded - exact
    difference = difference - difference.mean(1, keepdim=True)
    return float(difference.square().sum() / centred.square().sum().clamp(min=1e-30))


@torch.no_grad()
def signal_to_noise(
    rounded: fx.GraphModule, exact: fx.GraphModule, pairs: Mapping[str, tuple[fx.Node, fx.Node]], batches: Sequence[Tensor]
) -> dict[str, float]:
    """Decibels between each operator's result in the float network and its difference in the rounded one.

    Args:
        pairs: name -> the operator in `rounded` and in `exact`.
    """
    signal = dict.fromkeys(pairs, 0.0)
    noise = dict.fromkeys(pairs, 0.0)
    for images in batches:
        seen: dict[fx.Node, Tensor] = {}
        Observe(exact, [node for _, node in pairs.values()], lambda node, _, value: seen.update({node: value})).run(images)  # noqa: B023
        found: dict[fx.Node, Tensor] = {}
        Observe(rounded, [node for node, _ in pairs.values()], lambda node, _, value: found.update({node: value})).run(images)  # noqa: B023
        for name, (mine, theirs) in pairs.items():
            signal[name] += float(seen[theirs].double().square().sum())
            noise[name] += float((found[mine] - seen[theirs]).double().square().sum())
    return {name: _decibels(signal[name], noise[name]) for name in pairs}


def _decibels(signal: float, noise: float) -> float:
    if noise <= 0:
        return float("inf")
    return float(10 * torch.log10(torch.tensor(max(signal, 1e-30) / noise, dtype=torch.float64)))
