"""Which ATen operators cost what on an engine: names, by how `blocks` treats them."""

from __future__ import annotations

UNARY = {
    "relu": "relu",
    "relu6": "relu6",
    "hardtanh": "relu6",
    "clamp": "relu6",
    "clamp_min": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "hardswish": "hardswish",
    "hardsigmoid": "hardsigmoid",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "leaky_relu": "leaky_relu",
    "prelu": "leaky_relu",
    "elu": "elu",
    "softplus": "softplus",
    "mish": "softplus",
    "exp": "exp",
    "sqrt": "sqrt",
    "rsqrt": "sqrt",
    "square": "pow",
    "pow": "pow",
    "erf": "erf",
    "sin": "sin",
    "cos": "cos",
    "neg": "neg",
    "abs": "abs",
}
"""Functions of one value: ATen's name -> the block's."""
BINARY = {"add": "add", "sub": "sub", "rsub": "sub", "mul": "mul", "div": "div"}

VIEWS = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    "alias",
    "contiguous",
    "clone",
    "dropout",
    "feature_dropout",
    "detach",
    "expand",
    "expand_as",
    "reshape_as",
    "view_as",
    "to",
    "type_as",
    "_to_copy",
    "lift_fresh_copy",
}
"""The same values under another shape: nothing is computed."""
PARTS = {"split", "split_with_sizes", "chunk", "unbind", "tensor_split"}
"""One value as several: each is a copy, together as large as the whole."""
COPIES = {
    "slice",
    "select",
    "index",
    "roll",
    "pad",
    "constant_pad_nd",
    "narrow",
    "flip",
    "index_select",
    "gather",
}
"""A copy as large as the result."""
JOINS = {"cat", "concat", "stack"}
REDUCTIONS = {"mean", "sum", "amax", "amin", "linalg_vector_norm", "norm", "var", "cumsum"}
PRODUCTS = {"matmul", "bmm", "mm"}
IGNORED = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "sym_size",
    "sym_constrain_range_for_size",
    "_assert_async",
}
