"""Regions of a graph that run without autocast or gradients, put back into it.

In float32 and in inference they change nothing.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

_FIRST_ARGUMENT = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}
"""Where a region's own graph is among the arguments; its inputs follow."""


def inline_regions(module: fx.GraphModule) -> None:
    """Replace every region by its nodes, in place; regions inside regions as well."""
    found = True
    while found:
        found = False
        for node in list(module.graph.nodes):
            position = _FIRST_ARGUMENT.get(getattr(node.target, "__name__", ""))
            if node.op == "call_function" and position is not None:
                _inline(module, node, position)
                found = True
    module.graph.lint()
    module.recompile()


def _inline(module: fx.GraphModule, node: fx.Node, position: int) -> None:
    source: Any = node.args[position]
    region: Any = getattr(module, source.target)
    for name, inner in region.named_children():
        module.add_module(f"{source.target}_{name}", inner)
    inputs = [item for item in region.graph.nodes if item.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(inputs, node.args[position + 1 :], strict=True))
    with module.graph.inserting_before(node):
        outputs: Any = module.graph.graph_copy(region.graph, values)
    for inner_node in region.graph.nodes:
        if inner_node.op == "get_attr":
            values[inner_node].target = f"{source.target}_{inner_node.target}"
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(outputs[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not source.users:
        module.graph.erase_node(source)
