"""One rule an operator: which block it becomes, or which it disappears into."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from cveff.compress import block_names as names
from cveff.compress.block_walk import Node, Walk, argument, node_argument, operator, pair
from cveff.measure.block import FUSED, Block

LANES = 16
"""Channels in one piece of ONNX Runtime's blocked layout: fewer inputs are read as they are, and convolutions in groups
of any other number do without the layout."""


def _conv(walk: Walk, node: Node) -> None:
    x, weight = node_argument(node, 0), node_argument(node, 1)
    kernel, given = walk.shape(weight), walk.shape(x)
    groups = given[1] // kernel[1] if len(given) > 2 else 1
    rank = len(kernel) - 2
    stride = pair(argument(node, 3, 1), rank)
    dilation = pair(argument(node, 5, 1), rank)
    padding = argument(node, 4, 0)
    if isinstance(padding, str):
        padding = 0 if padding == "valid" else [(side - 1) // 2 for side in kernel[2:]]
    if _takes_blocked(kernel, groups):
        if groups > 1 or kernel[1] >= LANES:
            walk.enter(x)
        walk.blocked.add(node)
    else:
        walk.plain(x)
    block = Block(
        "conv",
        (given,),
        kernel,
        stride,
        pair(padding, rank),
        groups,
        dilation=() if set(dilation) == {1} else dilation,
    )
    walk.add(block, node, open_=True)


def _takes_blocked(kernel: tuple[int, ...], groups: int) -> bool:
    """Whether ONNX Runtime runs this convolution in its blocked layout."""
    if len(kernel) != 4:
        return False
    if groups == 1:
        return kernel[1] < LANES or kernel[1] % 4 == 0
    if kernel[1] == 1 and kernel[0] == groups:
        return groups % 4 == 0
    return kernel[1] % LANES == 0 and kernel[0] // groups % LANES == 0


def _linear(walk: Walk, node: Node) -> None:
    x, weight = node_argument(node, 0), node_argument(node, 1)
    walk.plain(x)
    walk.add(Block("linear", (walk.shape(x),), walk.shape(weight)), node, open_=True)


def _product_rule(walk: Walk, node: Node) -> None:
    left, right = node_argument(node, 0), node_argument(node, 1)
    _product(walk, left, right, walk.shape(left), walk.shape(right))
    walk.made_by[node] = len(walk.blocks) - 1


def _product(walk: Walk, left: Node, right: Node, rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    for item in (left, right):
        walk.plain(item)
    if right in walk.constant:
        walk.add(Block("matmul", (rows,), columns))
    else:
        walk.add(Block("matmul", (rows, columns)))


def _attention(walk: Walk, node: Node) -> None:
    query, key, value = (walk.shape(node_argument(node, index)) for index in range(3))
    scores = (*query[:-1], key[-2])
    q, k, v = (node_argument(node, index) for index in range(3))
    _product(walk, q, k, query, (*key[:-2], key[-1], key[-2]))  # the transposition is free inside it
    mask = argument(node, 3, None)
    if isinstance(mask, Node):
        given = (scores,) if mask in walk.constant else (scores, walk.shape(mask))
        weight = walk.shape(mask) if mask in walk.constant else ()
        walk.add(Block("elementwise", given, weight, op="add"))
    walk.add(Block("softmax", (scores,)))
    _product(walk, node, v, scores, value)


def _batch_norm(walk: Walk, node: Node) -> None:
    x = node_argument(node, 0)
    block = walk.open_block(x)
    if block is not None and block.kind in ("conv", "linear") and not block.activation:
        walk.extend(x, node, block)  # folded into the weights
        return
    if x in walk.blocked:
        walk.blocked.add(node)
    walk.add(Block("norm", (walk.shape(x),), walk.shape(x)[1:2], op="batch"), node, open_=True)


def _layer_norm(walk: Walk, node: Node) -> None:
    x = node_argument(node, 0)
    walk.plain(x)
    walk.add(Block("norm", (walk.shape(x),), walk.shape(x)[-1:], op="layer"))


def _group_norm(walk: Walk, node: Node) -> None:
    x = node_argument(node, 0)
    walk.plain(x)
    groups = int(argument(node, 1, 1))
    walk.add(Block("norm", (walk.shape(x),), walk.shape(x)[1:2], groups=groups, op="group"))


def _unary(walk: Walk, node: Node) -> None:
    x, name = node_argument(node, 0), names.UNARY[operator(node)]
    block = walk.open_block(x)
    is_fused = block is not None and (
        block.kind in ("conv", "linear") or (block.op == "batch" and name in FUSED)
    )
    if block is not None and is_fused and not block.activation:
        walk.extend(x, node, replace(block, activation=name))
        return
    if x in walk.blocked:
        walk.blocked.add(node)
    walk.add(Block("elementwise", (walk.shape(x),), op=name))


def _binary(walk: Walk, node: Node) -> None:
    op = names.BINARY[operator(node)]
    values = [item for item in node.args[:2] if isinstance(item, Node)]
    moving = [item for item in values if item not in walk.constant]
    if len(moving) == 2 and op == "add" and _fuse_residual(walk, node, moving):
        return
    if len(moving) == 1 and _fold(walk, node, moving[0], len(values) == 1):
        return
    shapes = [walk.shape(item) for item in moving]
    if op == "add" and len(moving) == 2 and shapes[0] == shapes[1] and walk.blocked.issuperset(moving):
        walk.blocked.add(node)
    else:
        for item in moving:
            walk.plain(item)
    shapes.sort(key=math.prod, reverse=True)  # engines broadcast the smaller
    weight: tuple[int, ...] = ()
    if len(moving) == 1:
        weight = next((walk.shape(item) for item in values if item in walk.constant), (1,)) or (1,)
    walk.add(Block("elementwise", tuple(shapes), weight, op=op))


def _fuse_residual(walk: Walk, node: Node, terms: Sequence[Node]) -> bool:
    """Whether the sum is computed by the convolution that makes one of its terms."""
    if walk.shape(terms[0]) != walk.shape(terms[1]):
        return False
    for term, other in (terms, reversed(terms)):
        block = walk.open_block(term)
        alike = (term in walk.blocked) == (other in walk.blocked) or other in walk.both
        is_open = block is not None and block.kind == "conv" and not block.activation
        if block is not None and is_open and len(block.inputs) == 1 and alike:
            walk.extend(term, node, replace(block, inputs=(block.inputs[0], walk.shape(other))))
            return True
    return False


def _fold(walk: Walk, node: Node, x: Node, by_number: bool) -> bool:
    """Whether a constant factor or offset disappears in the weights before it, or in a matrix product."""
    block = walk.open_block(x)
    if block is not None and not block.activation:
        is_weight = block.kind in ("conv", "linear") and len(block.inputs) == 1
        if is_weight or (by_number and block.kind == "matmul"):
            walk.extend(x, node, block)
            return True
    if by_number and all(operator(user) in names.PRODUCTS for user in node.users):
        walk.pass_on(x, node)
        return True
    return False


def _pool(walk: Walk, node: Node) -> None:
    x = node_argument(node, 0)
    op = "max" if operator(node).startswith("max") else "average"
    kernel = pair(argument(node, 1, 1), 2)
    stride = pair(argument(node, 2, None) or kernel, 2)
    padding = pair(argument(node, 3, 0), 2)
    _pooled(walk, node, x, Block("pool", (walk.shape(x),), kernel, stride, padding, op=op))


def _adaptive_pool(walk: Walk, node: Node) -> None:
    x = node_argument(node, 0)
    before, after = walk.shape(x), walk.shape(node)
    if before == after:
        walk.pass_on(x, node)
    elif math.prod(after[2:]) == 1:
        _reduction(walk, node)
    else:
        kernel = tuple(a // b for a, b in zip(before[2:], after[2:], strict=True))
        _pooled(walk, node, x, Block("pool", (before,), kernel, kernel, op="average"))


def _pooled(walk: Walk, node: Node, x: Node, block: Block) -> None:
    if walk.shape(x)[1] % LANES == 0:
        walk.enter(x)
        walk.blocked.add(node)
    else:
        walk.plain(x)
    walk.add(block)


def _reduction(walk: Walk, node: Node) -> None:
    x = node_argument(node, 0)
    walk.plain(x)
    walk.add(Block("pool", (walk.shape(x),), op="mean"))


def _softmax(walk: Walk, node: Node) -> None:
    x = node_argument(node, 0)
    walk.plain(x)
    walk.add(Block("softmax", (walk.shape(x),)))


def _join(walk: Walk, node: Node) -> None:
    parts = node.all_input_nodes
    _add_join(walk, node, walk.blocked.issuperset(parts))


def _add_join(walk: Walk, node: Node, is_blocked: bool) -> None:
    if is_blocked:
        walk.blocked.add(node)
        walk.add(Block("move", (walk.shape(node),), op="copy"))
    else:
        walk.copy(node)


def _parts(walk: Walk, node: Node) -> None:
    x = node_argument(node, 0)
    walk.plain(x)
    walk.add(Block("move", (walk.shape(x),), op="copy"))


def _item(walk: Walk, node: Node) -> None:
    """One of several parts, which are plain."""


def _copy(walk: Walk, node: Node) -> None:
    x = node_argument(node, 0)
    is_convolved = bool(node.users) and all(operator(user) == "conv2d" for user in node.users)
    if walk.shape(x) == walk.shape(node) and operator(node) in ("slice", "pad", "constant_pad_nd"):
        walk.pass_on(x, node)  # everything, or a border of nothing
    elif operator(node) in ("pad", "constant_pad_nd") and is_convolved:
        walk.pass_on(x, node)  # becomes the convolution's padding
    else:
        walk.copy(node)


def _resize(walk: Walk, node: Node) -> None:
    x = node_argument(node, 0)
    walk.plain(x)
    walk.add(Block("move", (walk.shape(x),), op="resize"))


def _transpose(walk: Walk, node: Node) -> None:
    x = node_argument(node, 0)
    rank = len(walk.shape(x))
    if operator(node) == "permute":
        order = [int(dim) % rank for dim in argument(node, 1, ())]
    else:
        order = list(range(rank))
        first, second = (
            (int(argument(node, index, 0)) % rank for index in (1, 2)) if operator(node) != "t" else (0, 1)
        )
        order[first], order[second] = order[second], order[first]
    walk.plain(x)
    moved = [dim for dim in order if walk.shape(x)[dim] > 1]
    is_swap = order[:-2] == list(range(rank - 2))
    is_operand = bool(node.users) and all(operator(user) in names.PRODUCTS for user in node.users)
    # Channels to the end and back is what reordering does anyway; matrix products read either operand transposed.
    is_free = moved == sorted(moved) or order in ([0, 2, 3, 1], [0, 3, 1, 2]) or (is_swap and is_operand)
    if not is_free:
        walk.add(Block("move", (walk.shape(x),), op=f"transpose:{','.join(map(str, order))}"))


def _view(walk: Walk, node: Node) -> None:
    x = node.all_input_nodes[0]
    if walk.shapes.get(x.name) == walk.shapes.get(node.name):
        walk.pass_on(x, node)
        return
    walk.plain(x)
    block = walk.open_block(x)
    if block is not None and block.kind == "linear":
        walk.made_by[node] = walk.made_by[x]


RULES: dict[str, Callable[[Walk, Node], None]] = {
    "conv1d": _conv,
    "conv2d": _conv,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool,
    "softmax": _softmax,
    "upsample_nearest2d": _resize,
    "upsample_bilinear2d": _resize,
    "upsample_bicubic2d": _resize,
    "permute": _transpose,
    "transpose": _transpose,
    "t": _transpose,
    "getitem": _item,
    **dict.fromkeys(names.PRODUCTS, _product_rule),
    **dict.fromkeys(names.UNARY, _unary),
    **dict.fromkeys(names.BINARY, _binary),
    **dict.fromkeys(names.REDUCTIONS, _reduction),
    **dict.fromkeys(names.JOINS, _join),
    **dict.fromkeys(names.PARTS, _parts),
    **dict.fromkeys(names.COPIES, _copy),
    **dict.fromkeys(names.VIEWS, _view),
}
