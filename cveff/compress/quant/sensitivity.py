"""What each rounding costs: how far it alone moves the network's answers, for all of them in one pass.

To second order the Kullback-Leibler divergence of the answers before and after a small change δ of an inner tensor is
½ E_k[(δ · ∂ log p_k)²], k drawn from the network's own answer (the Fisher information; Martens, JMLR 2020, section 9).
So one backward pass an image prices every tensor's and every weight's rounding at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cveff.compress.quant.capture import identify
from cveff.compress.quant.layers import find_layers, parameter
from cveff.compress.quant.network import Roundings


@dataclass(frozen=True)
class Cost:
    """Of one rounding.

    Attributes:
        nats: divergence of the answers that it alone causes, a mean over images.
        decibels: signal to noise of the tensor, or of the layer's output where a weight is rounded.
    """

    nats: float
    decibels: float


@dataclass(frozen=True)
class Costs:
    """Of every rounding in a network.

    Attributes:
        tensors: by operator whose result is rounded.
        weights: by operator that reads the weight.
    """

    tensors: Mapping[str, Cost]
    weights: Mapping[str, Cost]


def rounding_costs(
    exact: fx.GraphModule,
    rounded: fx.GraphModule,
    roundings: Roundings,
    batches: Sequence[Tensor],
    *,
    seed: int = 0,
) -> Costs:
    """Price every rounding of `rounded`.

    Args:
        exact: the capture that `rounded` was made from, with the weights it had.
        roundings: of `rounded`, as `insert` returned them.
        batches: images (B, C, H, W), normalised; a few dozen are enough to rank.
        seed: of the answers drawn.
    """
    run = _Prices(exact, rounded, roundings)
    generator = torch.Generator().manual_seed(seed)
    frozen = [(value, value.requires_grad) for value in exact.parameters()]
    try:
        for value, _ in frozen:
            value.requires_grad_(False)
        for images in batches:
            run.price(images, generator)
    finally:
        for value, wanted in frozen:
            value.requires_grad_(wanted)
    return Costs(run.result("tensor"), run.result("weight"))


class _Prices(fx.Interpreter):
    def __init__(self, exact: fx.GraphModule, rounded: fx.GraphModule, roundings: Roundings) -> None:
        super().__init__(exact)
        self.names = {node: name for name, node in identify(exact).items()}
        self.roundings = roundings
        self.layers = {
            layer.node: (
                roundings.weights[layer.name](parameter(rounded, other.weight).detach()),
                parameter(rounded, other.bias),
            )
            for layer, other in _pairs(exact, rounded)
            if layer.name in roundings.weights
        }
        self.changes: list[tuple[str, str, Tensor, Tensor]] = []
        self.sums: dict[tuple[str, str], list[float]] = {}

    def price(self, images: Tensor, generator: torch.Generator) -> None:
        self.changes = []
        logits: Tensor = self.run(images.clone().requires_grad_())
        answers = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)
        logits.log_softmax(1).gather(1, answers).sum().backward()  # type: ignore[no-untyped-call]
        for kind, name, value, change in self.changes:
            assert value.grad is not None
            moved = (value.grad * change).flatten(1).sum(1).double()
            sums = self.sums.setdefault((kind, name), [0.0, 0.0, 0.0, 0.0])
            sums[0] += float(moved.square().sum()) / 2
            sums[1] += len(images)
            sums[2] += float(value.detach().double().square().sum())
            sums[3] += float(change.double().square().sum())
        self.changes = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        name = self.names.get(n)
        if name is None or not isinstance(value, Tensor):
            return value
        rounding = self.roundings.tensors.get(name)
        if rounding is None and n not in self.layers:
            return value
        if value.requires_grad:
            value.retain_grad()
        with torch.no_grad():
            if rounding is not None:
                self.changes.append(("tensor", name, value, rounding(value.detach()) - value.detach()))
            if n in self.layers:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                weight, bias = self.layers[n]
                other = n.target(args[0].detach(), weight, bias, *args[3:], **kwargs)  # type: ignore[operator]
                self.changes.append(("weight", name, value, other - value.detach()))
        return value

    def result(self, kind: str) -> dict[str, Cost]:
        found = {}
        for (of, name), (nats, images, signal, noise) in self.sums.items():
            if of == kind:
                decibels = 10 * math.log10(max(signal, 1e-30) / noise) if noise > 0 else math.inf
                found[name] = Cost(nats / images, decibels)
        return found


def _pairs(exact: fx.GraphModule, rounded: fx.GraphModule) -> list[tuple[Any, Any]]:
    others = {layer.name: layer for layer in find_layers(rounded)}
    return [(layer, others[layer.name]) for layer in find_layers(exact) if layer.name in others]
