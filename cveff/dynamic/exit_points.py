"""Where a network can be left: blocks through whose output alone everything behind them sees the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cveff.compress.blocks import macs_of
from cveff.compress.features import Stage, captured, stage_of
from cveff.compress.trace import Trace, trace
from cveff.dynamic.exits import Pool, num_prefix_tokens
from cveff.errors import StepError
from cveff.runtime.input_spec import InputSpec

SHARES = (0.25, 0.5, 0.75)
"""Of the multiply-accumulate operations: where exits stand by default."""
_FIRST, _LAST = 0.02, 0.98
"""Before and behind these shares an exit would answer blindly, or save nothing."""


@dataclass(frozen=True)
class ExitPoint:
    """A block that can be left behind.

    Attributes:
        path: of the module.
        share: of the network's multiply-accumulate operations done when it has run.
        pool: how its output becomes a vector.
        width: channels of the output.
    """

    path: str
    share: float
    pool: Pool
    width: int


def exit_points(module: nn.Module, spec: InputSpec) -> list[ExitPoint]:
    """Every block that can be left, in the order they run; of modules that end at one value the outermost.

    Blocks are the members of sequences and of the network itself; layers within them are passed over, unless there is
    nothing else.

    Raises:
        StepError: the network cannot be traced.
    """
    traced = trace(module, spec)
    shares = _shares_at_cuts(traced)
    ends = _ends(traced)
    # The outermost module that ends at a cut stands for all that end there.
    paths = {ends[path]: path for path in sorted(ends, key=len, reverse=True) if ends[path] in shares}
    ordered = sorted(paths.items(), key=lambda item: item[0])
    found = []
    stages = _stages(module, spec, [path for _, path in ordered])
    unready = _without_prefix(module, stages)
    for stage in stages:
        if stage.path in unready:
            continue
        share = shares[ends[stage.path]]
        if _FIRST <= share <= _LAST:
            found.append(ExitPoint(stage.path, share, _pool(module, stage), stage.channels))
    return [point for point in found if _is_block(module, point.path)] or found


def choose(points: Sequence[ExitPoint], shares: Sequence[float] = SHARES) -> list[ExitPoint]:
    """The block nearest to each of these shares of the operations, without repeating one."""
    chosen = (
        {min(points, key=lambda point: abs(point.share - share)).path for share in shares}
        if points
        else set()
    )
    return [point for point in points if point.path in chosen]


def named(module: nn.Module, spec: InputSpec, paths: Sequence[str]) -> list[ExitPoint]:
    """The blocks a user named, in the order they run.

    Raises:
        StepError: a path is no module, or its output is neither a map of features nor tokens, or it has no class token
            yet.
    """
    known = dict(module.named_modules())
    for path in paths:
        if not path or path not in known:
            close = [point.path for point in exit_points(module, spec)]
            raise StepError(
                f"early_exit.exits: {path!r} is no block of the network; it can be left at {', '.join(close) or 'none'}"
            )
    traced = trace(module, spec)
    ends, done = _ends(traced), _cumulative(traced)
    every = _stages(module, spec, [*dict.fromkeys([*ends, *paths])])
    stages, unready = {stage.path: stage for stage in every}, _without_prefix(module, every)
    for path in paths:
        if path not in stages or path not in ends:
            raise StepError(
                f"early_exit.exits: {path!r} gives neither a map of features (N, C, H, W) nor tokens (N, "
                f"L, C), or runs "
                "no operator of its own; name a block"
            )
        if path in unready:
            raise StepError(
                f"early_exit.exits: {path!r} comes before the network's class and register tokens; name a block"
            )
    ordered = sorted(dict.fromkeys(paths), key=lambda path: ends[path])
    return [
        ExitPoint(path, done[ends[path]], _pool(module, stages[path]), stages[path].channels)
        for path in ordered
    ]


def _cumulative(traced: Trace) -> list[float]:
    """Share of the operations done when node i has run."""
    counts = [macs_of(node, traced.shapes) for node in traced.nodes]
    total, done, shares = max(1, sum(counts)), 0, []
    for count in counts:
        done += count
        shares.append(done / total)
    return shares


def _shares_at_cuts(traced: Trace) -> dict[int, float]:
    """Index of each node that all later ones see the image through -> share of the operations done there."""
    nodes = traced.nodes
    position = {node: index for index, node in enumerate(nodes)}
    images = set(traced.program.graph_signature.user_inputs)
    sees_image: set[torch.fx.Node] = set()
    last_use: dict[int, int] = {}
    for index, node in enumerate(nodes):
        if node.name in images:
            sees_image.add(node)
        sources = [source for source in node.all_input_nodes if source in sees_image]
        if sources:
            sees_image.add(node)
            for source in sources:
                last_use[position[source]] = index
    shares, reach = _cumulative(traced), -1
    cuts = {}
    for index, node in enumerate(nodes):
        if node not in sees_image or node.op != "call_function":
            continue
        # Nothing computed before this node is used behind it.
        reach = max((last for made, last in last_use.items() if made < index), default=-1)
        if reach <= index and node.name in traced.shapes:
            cuts[index] = shares[index]
    return cuts


def _ends(traced: Trace) -> dict[str, int]:
    """Path of each module that runs once -> index of the last node computed in it."""
    ends: dict[str, int] = {}
    repeated: set[str] = set()
    for index, node in enumerate(traced.nodes):
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            name, mark, _ = str(path).partition("@")
            if mark:
                repeated.add(name)
            if name:
                ends[name] = index
    return {path: index for path, index in ends.items() if path not in repeated}


def _stages(module: nn.Module, spec: InputSpec, paths: Sequence[str]) -> list[Stage]:
    """What the modules at `paths` put out, those left out that give no map and no tokens."""
    like = next(module.parameters())
    image = torch.zeros(1, spec.channels, *spec.size, device=like.device, dtype=like.dtype)
    was_training = module.training
    try:
        with torch.no_grad(), captured(module, paths) as outputs:
            module.eval()(image)
    finally:
        module.train(was_training)
    found = [stage_of(path, outputs.get(path), spec.size) for path in paths]
    return [stage for stage in found if stage is not None]


def _without_prefix(module: nn.Module, stages: Sequence[Stage]) -> set[str]:
    """Paths whose tokens are the image's alone, class and register tokens being put before them later."""
    prefix, lengths = num_prefix_tokens(module), {stage.positions for stage in stages if stage.is_tokens}
    return {
        stage.path for stage in stages if prefix and stage.is_tokens and stage.positions + prefix in lengths
    }


def _is_block(module: nn.Module, path: str) -> bool:
    around = module.get_submodule(path.rpartition(".")[0])
    is_member = around is module or isinstance(around, (nn.Sequential, nn.ModuleList))
    return is_member and any(module.get_submodule(path).children())


def _pool(module: nn.Module, stage: Stage) -> Pool:
    """As the network's own: of tokens the class token, unless there is none or the network takes the mean itself."""
    if not stage.is_tokens:
        return "channels-last" if stage.channels_last else "planes"
    has_class_token = num_prefix_tokens(module) > 0 and getattr(module, "cls_token", None) is not None
    takes_mean = str(getattr(module, "global_pool", "token")) in ("avg", "avgmax", "max")
    return "class-token" if has_class_token and not takes_mean else "tokens"
