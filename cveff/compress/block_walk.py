"""What is known of a network while its blocks are collected: what may still be fused, and which layout values have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cveff.errors import StepError
from cveff.measure.block import Block

Node = torch.fx.Node
Shapes = Mapping[str, tuple[int, ...]]


class Walk:
    """One pass over a graph.

    Attributes:
        shapes: node name -> shape.
        blocks: those collected so far.
        made_by: for a value that its block's engine could still do something more to (a residual, an activation), the
            index of that block.
        blocked: values in the layout of convolutions.
        both: values of which there is a copy in the other layout.
        constant: values that do not depend on the image.
        unknown: operators for which there is no rule.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.blocks: list[Block] = []
        self.made_by: dict[Node, int] = {}
        self.blocked: set[Node] = set()
        self.both: set[Node] = set()
        self.constant: set[Node] = set()
        self.unknown: set[str] = set()

    def shape(self, node: Node) -> tuple[int, ...]:
        """Shape of a value."""
        return self.shapes[node.name]

    def add(self, block: Block, node: Node | None = None, *, open_: bool = False) -> None:
        """Append a block; `open_`: more may be fused into it, as long as `node` is used once."""
        self.blocks.append(block)
        if open_ and node is not None:
            self.made_by[node] = len(self.blocks) - 1

    def plain(self, node: Node) -> None:
        """Have `node` in the usual layout."""
        if node in self.blocked and node not in self.both:
            self.both.add(node)
            self._reorder(node)

    def enter(self, node: Node) -> None:
        """Have `node` in the convolutions' layout."""
        if node not in self.blocked and node not in self.both and node not in self.constant:
            self.both.add(node)
            self._reorder(node)

    def _reorder(self, node: Node) -> None:
        shape = self.shape(node)
        if len(shape) == 4:
            self.blocks.append(Block("reorder", (shape,)))

    def open_block(self, node: Node) -> Block | None:
        """The block that made `node`, if the value is used nowhere else."""
        index = self.made_by.get(node)
        return self.blocks[index] if index is not None and len(node.users) == 1 else None

    def extend(self, source: Node, node: Node, block: Block) -> None:
        """`node` is what the block that made `source` gives once it also does what `block` says."""
        index = self.made_by.pop(source)
        self.blocks[index] = block
        self.made_by[node] = index
        if source in self.blocked:
            self.blocked.add(node)

    def pass_on(self, source: Node, node: Node) -> None:
        """`node` is `source` under another name."""
        if source in self.made_by and len(source.users) == 1:
            self.made_by[node] = self.made_by[source]
        if source in self.blocked:
            self.blocked.add(node)
            if source in self.both:
                self.both.add(node)

    def copy(self, node: Node) -> None:
        """`node` is written out anew."""
        for item in node.all_input_nodes:
            self.plain(item)
        self.add(Block("move", (self.shape(node),), op="copy"))


def operator(node: Node) -> str:
    """ATen's name of what a node computes, in place or not; "getitem" for an item; "" for what is no call."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", None)
    name: str = packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))
    return name.rstrip("_")


def argument(node: Node, index: int, default: Any) -> Any:
    """A positional argument, or `default` where the graph leaves it out."""
    return node.args[index] if len(node.args) > index else default


def node_argument(node: Node, index: int) -> Node:
    """A positional argument that is a value of the graph.

    Raises:
        StepError: it is something else.
    """
    item = node.args[index]
    if not isinstance(item, Node):
        raise StepError(f"argument {index} of {node.target} is {item!r}, which is no value of the network")
    return item


def pair(value: Any, rank: int) -> tuple[int, ...]:
    """One number for each of `rank` dimensions."""
    values = [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)]
    return tuple(values * rank if len(values) == 1 else values)
