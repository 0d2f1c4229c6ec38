"""A traced network as the blocks an engine runs, and its multiply-accumulate operations.

What ONNX Runtime fuses becomes one block: a convolution with its batch norm, the residual added to it and the
activation behind it; a linear layer with its bias and activation. It keeps what flows between convolutions in a layout
of its own; where a value leaves or enters that layout there is a "reorder". Views are free.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from cveff.compress import block_rules as rules
from cveff.compress.trace import Trace
from cveff.measure.block import FUSED, Block

_log = logging.getLogger(__name__)

LANES = 16
"""Channels in one piece of ONNX Runtime's blocked layout: fewer inputs are read as they are, and convolutions in groups
of any other number do without the layout."""

Node = torch.fx.Node
Shapes = Mapping[str, tuple[int, ...]]


def blocks(trace: Trace, shapes: Shapes | None = None) -> list[Block]:
    """The blocks in the order they run, for a batch of one.

    Args:
        shapes: node name -> shape, parameters included, of the same network pruned, as `Analysis.shapes` gives; by
            default the network as it was traced. So a pruned network's blocks are known before it is built.
    """
    return _Walk(trace, trace.shapes if shapes is None else shapes).run()


def macs(trace: Trace, shapes: Shapes | None = None) -> int:
    """Multiply-accumulate operations of convolutions, linear layers and matrix products, for a batch of one.

    Args:
        shapes: as for `blocks`.
    """
    shapes = trace.shapes if shapes is None else shapes
    total = 0
    for node in trace.nodes:
        name = operator(node)
        if name == "conv2d" or name == "conv1d":
            total += math.prod(shapes[node.name]) * math.prod(shapes[node.args[1].name][1:])
        elif name == "linear" or name in rules.PRODUCTS:
            total += math.prod(shapes[node.name]) * shapes[node.args[0].name][-1]
        elif name == "scaled_dot_product_attention":
            query, key, value = (shapes[item.name] for item in node.args[:3])
            total += math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return total


def operator(node: Node) -> str:
    """ATen's name of what a node computes, in place or not; "getitem" for an item; "" for what is no call."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", None)
    name: str = packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))
    return name.rstrip("_")


class _Walk:
    """One pass over the graph.

    `made_by` holds, for a value that its block's engine could still do something more to (a residual, an activation),
    the index of that block; `blocked` the values in the convolutions' layout; `both` those of which there is a
    copy in the other layout.
    """

    def __init__(self, trace: Trace, shapes: Shapes) -> None:
        self.trace, self.shapes = trace, shapes
        self.blocks: list[Block] = []
        self.made_by: dict[Node, int] = {}
        self.blocked: set[Node] = set()
        self.both: set[Node] = set()
        self.constant: set[Node] = set()
        self.unknown: set[str] = set()

    def run(self) -> list[Block]:
        images = set(self.trace.program.graph_signature.user_inputs)
        for node in self.trace.nodes:
            if node.op == "placeholder" and node.name in images:
                batch, channels, height, width = self.shapes[node.name]
                self.blocks.append(Block("input", ((batch, height, width, channels),)))
            elif node.op == "placeholder":
                self.constant.add(node)
            elif node.op == "output":
                for item in node.all_input_nodes:
                    self._plain(item)
            else:
                self._call(node)
        if self.unknown:
            _log.warning(
                "the time of %s is guessed as that of a copy: no block is known for it",
                ", ".join(sorted(self.unknown)),
            )
        return self.blocks

    def _call(self, node: Node) -> None:
        name = operator(node)
        if name in rules.IGNORED:
            return
        if all(item in self.constant for item in node.all_input_nodes):
            self.constant.add(node)  # computed once, when the file is made
            return
        rule = _RULES.get(name)
        if rule is not None:
            rule(self, node)
            return
        if node.name in self.shapes:
            self.unknown.add(name)
            self._copy(node)

    # What rules are made of.

    def shape(self, node: Node) -> tuple[int, ...]:
        return self.shapes[node.name]

    def _add(self, block: Block, node: Node | None = None, *, open_: bool = False) -> None:
        """Append a block; `open_`: more may be fused into it, as long as `node` is used once."""
        self.blocks.append(block)
        if open_ and node is not None:
            self.made_by[node] = len(self.blocks) - 1

    def _plain(self, node: Node) -> None:
        """Have `node` in the usual layout."""
        if node in self.blocked and node not in self.both:
            self.both.add(node)
            self._reorder(node)

    def _enter(self, node: Node) -> None:
        """Have `node` in the convolutions' layout."""
        if node not in self.blocked and node not in self.both and node not in self.constant:
            self.both.add(node)
            self._reorder(node)

    def _reorder(self, node: Node) -> None:
        shape = self.shape(node)
        if len(shape) == 4:
            self.blocks.append(Block("reorder", (shape,)))

    def _open_block(self, node: Node) -> Block | None:
        """The block that made `node`, if the value is used nowhere else."""
        index = self.made_by.get(node)
        return self.blocks[index] if index is not None and len(node.users) == 1 else None

    def _extend(self, source: Node, node: Node, block: Block) -> None:
        """`node` is what the block that made `source` gives once it also does what `block` says."""
        index = self.made_by.pop(source)
        self.blocks[index] = block
        self.made_by[node] = index
        if source in self.blocked:
            self.blocked.add(node)

    def _pass_on(self, source: Node, node: Node) -> None:
        """`node` is `source` under another name."""
        if source in self.made_by and len(source.users) == 1:
            self.made_by[node] = self.made_by[source]
        if source in self.blocked:
            self.blocked.add(node)
            if source in self.both:
                self.both.add(node)

    def _copy(self, node: Node) -> None:
        for item in node.all_input_nodes:
            self._plain(item)
        self._add(Block("move", (self.shape(node),), op="copy"))

    # One rule an operator.

    def conv(self, node: Node) -> None:
        x, weight = _node(node, 0), _node(node, 1)
        kernel, given = self.shape(weight), self.shape(x)
        groups = given[1] // kernel[1] if len(given) > 2 else 1
        rank = len(kernel) - 2
        stride = _pair(_argument(node, 3, 1), rank)
        dilation = _pair(_argument(node, 5, 1), rank)
        padding = _argument(node, 4, 0)
        if isinstance(padding, str):
            padding = 0 if padding == "valid" else [(side - 1) // 2 for side in kernel[2:]]
        if self._takes_blocked(kernel, groups):
            if groups > 1 or kernel[1] >= LANES:
                self._enter(x)
            self.blocked.add(node)
        else:
            self._plain(x)
        block = Block(
            "conv",
            (given,),
            kernel,
            stride,
            _pair(padding, rank),
            groups,
            dilation=() if set(dilation) == {1} else dilation,
        )
        self._add(block, node, open_=True)

    def _takes_blocked(self, kernel: tuple[int, ...], groups: int) -> bool:
        if len(kernel) != 4:
            return False
        if groups == 1:
            return kernel[1] < LANES or kernel[1] % 4 == 0
        if kernel[1] == 1 and kernel[0] == groups:
            return groups % 4 == 0
        return kernel[1] % LANES == 0 and kernel[0] // groups % LANES == 0

    def linear(self, node: Node) -> None:
        x, weight = _node(node, 0), _node(node, 1)
        self._plain(x)
        self._add(Block("linear", (self.shape(x),), self.shape(weight)), node, open_=True)

    def product(self, node: Node) -> None:
        left, right = _node(node, 0), _node(node, 1)
        self._product(left, right, self.shape(left), self.shape(right))
        self.made_by[node] = len(self.blocks) - 1

    def _product(self, left: Node, right: Node, rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
        for item in (left, right):
            self._plain(item)
        if right in self.constant:
            self._add(Block("matmul", (rows,), columns))
        else:
            self._add(Block("matmul", (rows, columns)))

    def attention(self, node: Node) -> None:
        query, key, value = (self.shape(_node(node, index)) for index in range(3))
        scores = (*query[:-1], key[-2])
        q, k, v = (_node(node, index) for index in range(3))
        self._product(q, k, query, (*key[:-2], key[-1], key[-2]))  # the transposition is free inside it
        mask = _argument(node, 3, None)
        if isinstance(mask, Node):
            given = (scores,) if mask in self.constant else (scores, self.shape(mask))
            weight = self.shape(mask) if mask in self.constant else ()
            self._add(Block("elementwise", given, weight, op="add"))
        self._add(Block("softmax", (scores,)))
        self._product(node, v, scores, value)

    def batch_norm(self, node: Node) -> None:
        x = _node(node, 0)
        block = self._open_block(x)
        if block is not None and block.kind in ("conv", "linear") and not block.activation:
            self._extend(x, node, block)  # folded into the weights
            return
        if x in self.blocked:
            self.blocked.add(node)
        self._add(Block("norm", (self.shape(x),), self.shape(x)[1:2], op="batch"), node, open_=True)

    def layer_norm(self, node: Node) -> None:
        x = _node(node, 0)
        self._plain(x)
        self._add(Block("norm", (self.shape(x),), self.shape(x)[-1:], op="layer"))

    def group_norm(self, node: Node) -> None:
        x = _node(node, 0)
        self._plain(x)
        groups = int(_argument(node, 1, 1))
        self._add(Block("norm", (self.shape(x),), self.shape(x)[1:2], groups=groups, op="group"))

    def unary(self, node: Node) -> None:
        x, name = _node(node, 0), rules.UNARY[operator(node)]
        block = self._open_block(x)
        is_fused = block is not None and (
            block.kind in ("conv", "linear") or (block.op == "batch" and name in FUSED)
        )
        if block is not None and is_fused and not block.activation:
            self._extend(x, node, replace(block, activation=name))
            return
        if x in self.blocked:
            self.blocked.add(node)
        self._add(Block("elementwise", (self.shape(x),), op=name))

    def binary(self, node: Node) -> None:
        op = rules.BINARY[operator(node)]
        values = [item for item in node.args[:2] if isinstance(item, Node)]
        moving = [item for item in values if item not in self.constant]
        if len(moving) == 2 and op == "add" and self._fuse_residual(node, moving):
            return
        if len(moving) == 1 and self._fold(node, moving[0], len(values) == 1):
            return
        shapes = [self.shape(item) for item in moving]
        if op == "add" and len(moving) == 2 and shapes[0] == shapes[1] and self.blocked.issuperset(moving):
            self.blocked.add(node)
        else:
            for item in moving:
                self._plain(item)
        shapes.sort(key=math.prod, reverse=True)  # engines broadcast the smaller
        weight: tuple[int, ...] = ()
        if len(moving) == 1:
            weight = next((self.shape(item) for item in values if item in self.constant), (1,)) or (1,)
        self._add(Block("elementwise", tuple(shapes), weight, op=op))

    def _fuse_residual(self, node: Node, terms: Sequence[Node]) -> bool:
        """Whether the sum is computed by the convolution that makes one of its terms."""
        if self.shape(terms[0]) != self.shape(terms[1]):
            return False
        for term, other in (terms, reversed(terms)):
            block = self._open_block(term)
            alike = (term in self.blocked) == (other in self.blocked) or other in self.both
            is_open = block is not None and block.kind == "conv" and not block.activation
            if block is not None and is_open and len(block.inputs) == 1 and alike:
                self._extend(term, node, replace(block, inputs=(block.inputs[0], self.shape(other))))
                return True
        return False

    def _fold(self, node: Node, x: Node, by_number: bool) -> bool:
        """Whether a constant factor or offset disappears in the weights before it, or in a matrix product."""
        block = self._open_block(x)
        if block is not None and not block.activation:
            is_weight = block.kind in ("conv", "linear") and len(block.inputs) == 1
            if is_weight or (by_number and block.kind == "matmul"):
                self._extend(x, node, block)
                return True
        if by_number and all(operator(user) in rules.PRODUCTS for user in node.users):
            self._pass_on(x, node)
            return True
        return False

    def pool(self, node: Node) -> None:
        x = _node(node, 0)
        op = "max" if operator(node).startswith("max") else "average"
        kernel = _pair(_argument(node, 1, 1), 2)
        stride = _pair(_argument(node, 2, None) or kernel, 2)
        padding = _pair(_argument(node, 3, 0), 2)
        self._pooled(node, x, Block("pool", (self.shape(x),), kernel, stride, padding, op=op))

    def adaptive_pool(self, node: Node) -> None:
        x = _node(node, 0)
        before, after = self.shape(x), self.shape(node)
        if before == after:
            self._pass_on(x, node)
        elif math.prod(after[2:]) == 1:
            self.reduction(node)
        else:
            kernel = tuple(a // b for a, b in zip(before[2:], after[2:], strict=True))
            self._pooled(node, x, Block("pool", (before,), kernel, kernel, op="average"))

    def _pooled(self, node: Node, x: Node, block: Block) -> None:
        if self.shape(x)[1] % LANES == 0:
            self._enter(x)
            self.blocked.add(node)
        else:
            self._plain(x)
        self._add(block)

    def reduction(self, node: Node) -> None:
        x = _node(node, 0)
        self._plain(x)
        self._add(Block("pool", (self.shape(x),), op="mean"))

    def softmax(self, node: Node) -> None:
        x = _node(node, 0)
        self._plain(x)
        self._add(Block("softmax", (self.shape(x),)))

    def join(self, node: Node) -> None:
        parts = node.all_input_nodes
        self._add_join(node, self.blocked.issuperset(parts))

    def _add_join(self, node: Node, is_blocked: bool) -> None:
        if is_blocked:
            self.blocked.add(node)
            self._add(Block("move", (self.shape(node),), op="copy"))
        else:
            self._copy(node)

    def parts(self, node: Node) -> None:
        x = _node(node, 0)
        self._plain(x)
        self._add(Block("move", (self.shape(x),), op="copy"))

    def item(self, node: Node) -> None:
        """One of several parts, which are plain."""

    def copy(self, node: Node) -> None:
        x = _node(node, 0)
        is_convolved = bool(node.users) and all(operator(user) == "conv2d" for user in node.users)
        if self.shape(x) == self.shape(node) and operator(node) in ("slice", "pad", "constant_pad_nd"):
            self._pass_on(x, node)  # everything, or a border of nothing
        elif operator(node) in ("pad", "constant_pad_nd") and is_convolved:
            self._pass_on(x, node)  # becomes the convolution's padding
        else:
            self._copy(node)

    def resize(self, node: Node) -> None:
        x = _node(node, 0)
        self._plain(x)
        self._add(Block("move", (self.shape(x),), op="resize"))

    def transpose(self, node: Node) -> None:
        x = _node(node, 0)
        rank = len(self.shape(x))
        if operator(node) == "permute":
            order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]
        else:
            order = list(range(rank))
            first, second = (
                (int(_argument(node, index, 0)) % rank for index in (1, 2))
                if operator(node) != "t"
                else (0, 1)
            )
            order[first], order[second] = order[second], order[first]
        self._plain(x)
        moved = [dim for dim in order if self.shape(x)[dim] > 1]
        is_swap = order[:-2] == list(range(rank - 2))
        is_operand = bool(node.users) and all(operator(user) in rules.PRODUCTS for user in node.users)
        # Channels to the end and back is what reordering does anyway; matrix products read either operand transposed.
        is_free = moved == sorted(moved) or order in ([0, 2, 3, 1], [0, 3, 1, 2]) or (is_swap and is_operand)
        if not is_free:
            self._add(Block("move", (self.shape(x),), op=f"transpose:{','.join(map(str, order))}"))

    def view(self, node: Node) -> None:
        x = node.all_input_nodes[0]
        if self.shapes.get(x.name) == self.shapes.get(node.name):
            self._pass_on(x, node)
            return
        self._plain(x)
        block = self._open_block(x)
        if block is not None and block.kind == "linear":
            self.made_by[node] = self.made_by[x]


_RULES: dict[str, Callable[[_Walk, Node], None]] = {
    "conv1d": _Walk.conv,
    "conv2d": _Walk.conv,
    "linear": _Walk.linear,
    "scaled_dot_product_attention": _Walk.attention,
    "batch_norm": _Walk.batch_norm,
    "layer_norm": _Walk.layer_norm,
    "group_norm": _Walk.group_norm,
    "max_pool2d": _Walk.pool,
    "avg_pool2d": _Walk.pool,
    "adaptive_avg_pool2d": _Walk.adaptive_pool,
    "adaptive_max_pool2d": _Walk.adaptive_pool,
    "softmax": _Walk.softmax,
    "upsample_nearest2d": _Walk.resize,
    "upsample_bilinear2d": _Walk.resize,
    "upsample_bicubic2d": _Walk.resize,
    "permute": _Walk.transpose,
    "transpose": _Walk.transpose,
    "t": _Walk.transpose,
    "getitem": _Walk.item,
    **dict.fromkeys(rules.PRODUCTS, _Walk.product),
    **dict.fromkeys(rules.UNARY, _Walk.unary),
    **dict.fromkeys(rules.BINARY, _Walk.binary),
    **dict.fromkeys(rules.REDUCTIONS, _Walk.reduction),
    **dict.fromkeys(rules.JOINS, _Walk.join),
    **dict.fromkeys(rules.PARTS, _Walk.parts),
    **dict.fromkeys(rules.COPIES, _Walk.copy),
    **dict.fromkeys(rules.VIEWS, _Walk.view),
}


def _argument(node: Node, index: int, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else default


def _node(node: Node, index: int) -> Node:
    item = node.args[index]
    assert isinstance(item, Node)
    return item


def _pair(value: Any, rank: int) -> tuple[int, ...]:
    values = [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)]
    return tuple(values * rank if len(values) == 1 else values)
