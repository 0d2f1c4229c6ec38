"""A traced network as the blocks an engine runs, and its multiply-accumulate operations.

What ONNX Runtime fuses becomes one block: a convolution with its batch norm, the residual added to it and the
activation behind it; a linear layer with its bias and activation. It keeps what flows between convolutions in a layout
of its own; where a value leaves or enters that layout there is a "reorder". Views are free.
"""

from __future__ import annotations

import logging
import math

from cveff.compress import block_names as names
from cveff.compress.block_rules import RULES
from cveff.compress.block_walk import Node, Shapes, Walk, node_argument, operator
from cveff.compress.trace import Trace
from cveff.measure.block import Block

_log = logging.getLogger(__name__)


def blocks(trace: Trace, shapes: Shapes | None = None) -> list[Block]:
    """The blocks in the order they run, for a batch of one.

    Args:
        shapes: node name -> shape, parameters included, of the same network pruned, as `Analysis.shapes` gives; by
            default the network as it was traced. So a pruned network's blocks are known before it is built.
    """
    walk = Walk(trace.shapes if shapes is None else shapes)
    images = set(trace.program.graph_signature.user_inputs)
    for node in trace.nodes:
        if node.op == "placeholder" and node.name in images:
            batch, channels, height, width = walk.shape(node)
            walk.add(Block("input", ((batch, height, width, channels),)))
        elif node.op == "placeholder":
            walk.constant.add(node)
        elif node.op == "output":
            for item in node.all_input_nodes:
                walk.plain(item)
        else:
            _call(walk, node)
    if walk.unknown:
        _log.warning(
            "the time of %s is guessed as that of a copy: no block is known for it",
            ", ".join(sorted(walk.unknown)),
        )
    return walk.blocks


def macs(trace: Trace, shapes: Shapes | None = None) -> int:
    """Multiply-accumulate operations of convolutions, linear layers and matrix products, for a batch of one.

    Args:
        shapes: as for `blocks`.
    """
    shapes = trace.shapes if shapes is None else shapes
    return sum(macs_of(node, shapes) for node in trace.nodes)


def macs_of(node: Node, shapes: Shapes) -> int:
    """The operations of one node; 0 for what is no convolution, linear layer or matrix product."""
    name = operator(node)
    if name in ("conv1d", "conv2d"):
        return math.prod(shapes[node.name]) * math.prod(shapes[node_argument(node, 1).name][1:])
    if name == "linear" or name in names.PRODUCTS:
        return math.prod(shapes[node.name]) * shapes[node_argument(node, 0).name][-1]
    if name == "scaled_dot_product_attention":
        query, key, value = (shapes[node_argument(node, index).name] for index in range(3))
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0


def _call(walk: Walk, node: Node) -> None:
    name = operator(node)
    if name in names.IGNORED:
        return
    if all(item in walk.constant for item in node.all_input_nodes):
        walk.constant.add(node)  # computed once, when the file is made
    elif name in RULES:
        RULES[name](walk, node)
    elif node.name in walk.shapes:
        walk.unknown.add(name)
        walk.copy(node)
