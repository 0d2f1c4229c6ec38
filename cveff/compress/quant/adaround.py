"""Learn which way each weight is rounded, block by block, from what the float block returns.

AdaRound (Nagel et al., ICML 2020): w = s · (floor(w/s) + h(v)) with h a stretched sigmoid that a regulariser drives to
0 or 1, trained to reproduce the layer's output. BRECQ (Li et al., ICLR 2021) does so for the layers of a residual block
together, whose errors interact: a block here is a run of operators between two tensors that everything later depends on
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cveff.compress.quant.layers import Layer, Observe, find_layers, parameter, weight_rounding
from cveff.compress.quant.ranges import rounding_off
from cveff.errors import StepError
from cveff.progress import Progress, Silent

ZETA, GAMMA = 1.1, -0.1
"""The sigmoid is stretched to this range and clipped to [0, 1], so that it reaches both ends (section 3.2)."""
_BATCH = 32


@dataclass(frozen=True)
class Reconstruction:
    """Settings of the training of each block.

    Attributes:
        steps: of Adam a block.
        learning_rate: of the roundings.
        regularisation: weight of the term that makes every rounding a decision.
        warmup: share of the steps without it.
    """

    steps: int = 500
    learning_rate: float = 1e-2
    regularisation: float = 0.01
    warmup: float = 0.2

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise StepError(f"reconstruction steps are {self.steps}; give 1 or more")


class _SoftRounding(nn.Module):
    """A weight between its two neighbours on the grid."""

    def __init__(self, weight: Tensor, scale: Tensor, low: int, high: int) -> None:
        super().__init__()
        self.scale, self.low, self.high = scale, low, high
        ratio = weight / scale
        self.below = ratio.floor()
        rest = (ratio - self.below).clamp(0.01, 0.99)
        self.decision = nn.Parameter(torch.logit((rest - GAMMA) / (ZETA - GAMMA)))

    def shares(self) -> Tensor:
        """How far up each weight is, in [0, 1]."""
        return (torch.sigmoid(self.decision) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self, hard: bool = False) -> Tensor:
        """The weight."""
        up = (self.shares() >= 0.5).float() if hard else self.shares()
        return (self.below + up).clamp(self.low, self.high) * self.scale

    def indecision(self, beta: float) -> Tensor:
        """Zero once every share is 0 or 1."""
        return (1 - (2 * self.shares() - 1).abs().pow(beta)).sum()


@torch.enable_grad()
def reconstruct(
    rounded: fx.GraphModule,
    exact: fx.GraphModule,
    batches: Sequence[Tensor],
    settings: Reconstruction | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Put every rounded layer's weight on its grid, in place, block after block.

    Args:
        rounded: captured, with roundings whose steps are set and weights that are not rounded yet.
        exact: the same capture without roundings.
        batches: images (B, C, H, W), normalised.
        seed: of the order of images.
    """
    settings = settings or Reconstruction()
    layers = [layer for layer in find_layers(rounded) if weight_rounding(rounded, layer) is not None]
    found = blocks(rounded, layers)
    for block in (progress or Silent()).track(found, "learning roundings", len(found)):
        _reconstruct_block(rounded, exact, block, batches, settings, seed)


@dataclass(frozen=True)
class Block:
    """Operators between `start` (not included) and `end`.

    Attributes:
        start, end: nodes of the graph; everything in between depends on `start` and parameters alone.
        layers: those with rounded weights.
    """

    start: fx.Node
    end: fx.Node
    layers: tuple[Layer, ...]


def blocks(graph: fx.GraphModule, layers: Sequence[Layer]) -> list[Block]:
    """The network cut at every tensor that alone carries what came before, as finely as layers allow."""
    order = [node for node in graph.graph.nodes if node.op not in ("get_attr", "output")]
    place = {node: index for index, node in enumerate(order)}
    last_use = {
        node: max((place.get(user, len(order)) for user in node.users), default=place[node]) for node in order
    }
    cuts, open_until = [], -1
    for index, node in enumerate(order):
        # Nothing made before `node` is read after it: the network passes through this tensor.
        if open_until <= index and isinstance(node.meta.get("val"), torch.Tensor):
            cuts.append(node)
        open_until = max(open_until, last_use[node])
    by_node = {layer.node: layer for layer in layers}
    found: list[Block] = []
    start = cuts[0] if cuts else None
    for end in cuts[1:]:
        assert start is not None
        inside = [by_node[node] for node in order[place[start] + 1 : place[end] + 1] if node in by_node]
        if inside:
            found.append(Block(start, end, tuple(inside)))
            start = end
        elif not found:
            start = end
    return found


def _reconstruct_block(
    rounded: fx.GraphModule,
    exact: fx.GraphModule,
    block: Block,
    batches: Sequence[Tensor],
    settings: Reconstruction,
    seed: int,
) -> None:
    inputs, targets = _values(rounded, exact, block, batches)
    part = _between(rounded, block)
    soft: dict[str, _SoftRounding] = {}
    for layer in block.layers:
        rounding = weight_rounding(rounded, layer)
        assert rounding is not None
        weight = parameter(rounded, layer.weight).detach()
        shape = [1] * weight.ndim
        shape[rounding.axis or 0] = -1
        soft[layer.weight] = _SoftRounding(
            weight, rounding.scale.reshape(shape), rounding.grid.low, rounding.grid.high
        )
        rounding.enabled = False
    optimizer = torch.optim.Adam([item.decision for item in soft.values()], lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(settings.steps):
        chosen = torch.randperm(len(inputs), generator=generator)[:_BATCH]
        weights = {path: item() for path, item in soft.items()}
        result: Any = torch.func.functional_call(part, weights, (inputs[chosen],))
        loss = (result - targets[chosen]).square().flatten(1).sum(1).mean() / targets[0].numel()
        done = step / settings.steps
        if done >= settings.warmup:
            beta = 2 + 18 * (1 - (done - settings.warmup) / (1 - settings.warmup))
            total = sum(item.decision.numel() for item in soft.values())
            scale = targets.square().mean()
            loss = (
                loss
                + settings.regularisation
                * scale
                * sum((item.indecision(beta) for item in soft.values()), torch.tensor(0.0))
                / total
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for layer in block.layers:
            parameter(rounded, layer.weight).copy_(soft[layer.weight](hard=True))
            rounding = weight_rounding(rounded, layer)
            assert rounding is not None
            rounding.enabled = True


@torch.no_grad()
def _values(
    rounded: fx.GraphModule, exact: fx.GraphModule, block: Block, batches: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """What the rounded network gives the block, and what the float network's block returns."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    ends = {node.name: node for node in exact.graph.nodes}
    target = ends[_own(block.end).name]
    for images in batches:
        run = Observe(rounded, [], lambda *_: None)
        inputs.append(_until(run, block.start, images))
        with rounding_off(exact):
            targets.append(_until(Observe(exact, [], lambda *_: None), target, images))
    return torch.cat(inputs), torch.cat(targets)


def _own(node: fx.Node) -> fx.Node:
    """The operator behind a rounding: the float network has no node for the rounding itself."""
    while node.op == "call_module":
        node = node.args[0]  # type: ignore[assignment]
    return node


class _ReachedError(Exception):
    """An inner tensor was computed; nothing after it is needed."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _until(interpreter: Observe, node: fx.Node, images: Tensor) -> Tensor:
    run = interpreter.run_node

    def stop(n: fx.Node) -> Any:
        value = run(n)
        if n is node:
            raise _ReachedError(value)
        return value

    interpreter.run_node = stop  # type: ignore[method-assign]
    try:
        interpreter.run(images)
    except _ReachedError as reached:
        return reached.value
    raise StepError(f"{node.name} was never computed")


def _between(graph: fx.GraphModule, block: Block) -> fx.GraphModule:
    """The block as a module of its own, with the network's parameters."""
    part = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    inside = False
    for node in graph.graph.nodes:
        if node is block.start:
            values[node] = part.placeholder("x")
            inside = True
            continue
        if node.op == "get_attr" or inside:
            values[node] = part.node_copy(node, lambda old: values[old])
        if node is block.end:
            break
    part.output(values[block.end])
    found = fx.GraphModule(graph, part)
    found.graph.eliminate_dead_code()
    found.recompile()
    return found
