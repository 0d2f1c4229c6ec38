"""The type of every tensor of a network in 16 bits: as operators must have it, and with the fewest bytes moved.

Operators that may compute in either type are divided by a minimum cut: an operator in 32 bits reads and writes two
bytes a value more, a conversion reads one type and writes the other and is shared by all who read its result. So a
cheap operator between two that need 32 bits stays with them, and a residual stream changes types where it is cheapest.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from cveff.compress.quant.half_rules import COMPUTE, data_inputs, is_float, kind_of, reads_any_type

CAST_BYTES = 6
"""Of one value: four read and two written, or the other way round."""
WIDER_BYTES = 2
"""Of one value in 32 bits, beyond what it would take in 16."""
LAUNCH_BYTES = 2**15
"""What a conversion costs before its first value, as bytes moved in that time: 10 ns at 3 TB/s, 2 μs at 16 GB/s."""


def choose_types(graph: fx.GraphModule, keep: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Nodes that compute, or are stored, in 16 bits.

    Args:
        graph: captured and tidied; with `val` in every node's `meta`.
        keep: operators that must compute in float32.
    """
    import networkx  # type: ignore[import-untyped]  # PyTorch depends on it

    network: Any = networkx.DiGraph()
    nodes = [node for node in graph.graph.nodes if node.op == "output" or is_float(node)]
    known = set(nodes)
    keep = {*keep, *(layer for node in keep for layer in _fused_with(node))}
    for node in nodes:
        kind = "float" if node in keep or node.op in ("placeholder", "output") else kind_of(node)
        if node.op == "get_attr":
            # Weights are rounded from float32, or they would be other integers.
            kind = "float" if any(map(reads_any_type, node.users)) else "either"
        _add(network, "half", node, math.inf if kind == "half" else 0)
        cost = (
            math.inf
            if kind == "float"
            else WIDER_BYTES * (_values(node) + sum(map(_values, data_inputs(node))))
        )
        _add(network, node, "float", cost)
    for node in nodes:
        readers = [
            user
            for user in node.users
            if user in known and node in data_inputs(user) and not reads_any_type(user)
        ]
        together = [user for user in readers if _is_item(user) or node in _fused_with(user)]
        for user in together:
            _add(network, node, user, math.inf)
            _add(network, user, node, math.inf)
        readers = [user for user in readers if user not in together]
        if readers and not reads_any_type(node):
            cost = CAST_BYTES * _values(node) + LAUNCH_BYTES
            down, up = (node, "to half"), (node, "to float")
            _add(network, node, up, cost)
            _add(network, down, node, cost)
            for user in readers:
                _add(network, up, user, math.inf)
                _add(network, user, down, math.inf)
    cut = networkx.algorithms.flow.boykov_kolmogorov
    _, (halves, _) = networkx.minimum_cut(network, "half", "float", flow_func=cut)
    return {node for node in halves if isinstance(node, fx.Node) and node.op != "output"}


def _add(network: Any, start: object, end: object, cost: float) -> None:
    if cost == 0:
        network.add_node(start)
        network.add_node(end)
    elif cost == math.inf:
        network.add_edge(start, end)  # without a capacity: it is never cut
    else:
        before = network.get_edge_data(start, end, {"capacity": 0})
        if "capacity" in before:
            network.add_edge(start, end, capacity=before["capacity"] + cost)


def _fused_with(node: fx.Node) -> list[fx.Node]:
    """The products whose 8-bit kernel also adds a rounded tensor: it does not, where a conversion is between them."""
    if node.target in COMPUTE or not any(map(reads_any_type, node.all_input_nodes)):
        return []
    return [item for item in node.all_input_nodes if item.target in COMPUTE]


def _is_item(node: fx.Node) -> bool:
    """One of several tensors that an operator returns: it has their type."""
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and isinstance(source.meta.get("val"), (list, tuple))


def _values(node: fx.Node) -> int:
    """Values of one image's tensor; the batch's size is 1."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return sum(math.prod(map(_size, item.shape)) for item in tensors if isinstance(item, torch.Tensor))


def _size(side: int | torch.SymInt) -> int:
    if isinstance(side, int):
        return side
    expression = side.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))
