"""Sizes that a module's own code holds (`num_heads`, `split_sizes`, `groups`), followed when channels go.

An attribute is recognised by what it does: its value is the size that a reshape, a split or a slice of the same
module uses along a dimension that shrinks. What was recognised wrongly is caught by running the pruned network
(`proof.py`), so no list of classes is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cveff.compress.layout import stays
from cveff.compress.operators import operator_name

if TYPE_CHECKING:
    from cveff.compress.groups import Analysis

_SHAPED = frozenset(["view", "reshape", "expand", "unflatten", "repeat", "new_zeros", "zeros"])
_TORCH = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Sequential)


def held_sizes(
    analysis: Analysis, masks: Sequence[np.ndarray], module: nn.Module
) -> dict[str, dict[str, Any]]:
    """Module path -> attribute -> the value it must have once only the units of `masks` are left."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    sizes: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    lists: dict[str, list[tuple[list[int], list[int]]]] = defaultdict(list)
    for node in analysis.trace.nodes:
        if node.op != "call_function":
            continue
        name, path = operator_name(node), analysis.trace.modules[node.name]
        if name in _SHAPED:
            before, after = list(analysis.trace.shapes[node.name]), _left(analysis, node, masks)
            _compare(before, after, sizes[path])
            lists[path].append((before, after))
        elif name in ("split", "split_with_sizes"):
            before, after = _parts(analysis, node, masks)
            _compare(before, after, sizes[path])
            lists[path].append((before, after))
        elif name in ("slice", "narrow"):
            _compare(*_cut(analysis, node, masks), sizes[path])
        elif name == "layer_norm" and (len(node.args) < 3 or node.args[2] is None):
            size = _left(analysis, node, masks)
            if size[-1] != analysis.trace.shapes[node.name][-1]:
                found[path]["normalized_shape"] = [size[-1]]
        elif name == "group_norm" and node.name in analysis.norm_groups:
            groups = analysis.norm_groups[node.name]
            channels, left = analysis.trace.shapes[node.name][1], _left(analysis, node, masks)[1]
            if left != channels:
                found[path]["num_groups"] = left * groups // channels
    for weight, groups in analysis.grouped.items():
        layout = analysis.parameters.get(weight, {}).get(0)
        if layout is not None:
            left = int(stays(layout, masks).sum())
            new, path = left * groups // len(layout), weight.rpartition(".")[0]
            if new != groups and getattr(module.get_submodule(path), "groups", None) == groups:
                found[path]["groups"] = new
            elif new != groups:
                sizes[path][groups].add(new)  # a blur's own code names them, or counts its input's channels
    for path in {*sizes, *lists}:
        owner = module.get_submodule(path)
        if not isinstance(owner, _TORCH):
            held = _attributes(owner, sizes[path], lists[path])
            found[path] |= {
                key: value for key, value in held.items() if (path, key) not in analysis.unrelated
            }
    return {path: values for path, values in found.items() if values}


def _attributes(
    owner: nn.Module, sizes: Mapping[int, set[int]], lists: Sequence[tuple[list[int], list[int]]]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(owner).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int) and len(sizes.get(value, ())) == 1:
            (new,) = sizes[value]
            if new != value:
                found[name] = new
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
            after = next((new for old, new in lists if old == list(value) and new != old), None)
            if after is not None:
                found[name] = after
    return found


def _compare(before: Sequence[int], after: Sequence[int], sizes: dict[int, set[int]]) -> None:
    for old, new in zip(before, after, strict=True):
        if old != new:
            sizes[old].add(new)


def _left(analysis: Analysis, node: torch.fx.Node, masks: Sequence[np.ndarray]) -> list[int]:
    shape = list(analysis.trace.shapes[node.name])
    for dim, layout in analysis.values.get(node.name, {}).items():
        shape[dim] = int(stays(layout, masks).sum())
    return shape


def _parts(
    analysis: Analysis, node: torch.fx.Node, masks: Sequence[np.ndarray]
) -> tuple[list[int], list[int]]:
    """Sizes of a split's parts, before and after."""
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    parts = sorted((int(user.args[1]), user) for user in node.users)  # type: ignore[arg-type]
    before, after = [], []
    for _, user in parts:
        shape = analysis.trace.shapes[user.name]
        before.append(shape[int(dim)])  # type: ignore[arg-type]
        after.append(_left(analysis, user, masks)[int(dim)])  # type: ignore[arg-type]
    return before, after


def _cut(analysis: Analysis, node: torch.fx.Node, masks: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Start and end of a slice, before and after."""
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    size = analysis.trace.shapes[source.name][dim]
    start, end = (node.args[index] if len(node.args) > index else None for index in (2, 3))
    bounds = [int(start or 0), int(size if end is None else end)]  # type: ignore[arg-type]
    bounds = [min(bound + size if bound < 0 else bound, size) for bound in bounds]
    layout = analysis.values.get(source.name, {}).get(dim % len(analysis.trace.shapes[source.name]))
    if layout is None:
        return bounds, bounds
    staying = stays(layout, masks)
    return bounds, [int(staying[:bound].sum()) for bound in bounds]
