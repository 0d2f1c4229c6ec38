"""ATen operators by what they do to channels. One that is named nowhere has no rule, and freezes what crosses it."""

from __future__ import annotations

import torch

MOVES = frozenset(
    [
        "view",
        "reshape",
        "permute",
        "transpose",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "cat",
        "stack",
        "contiguous",
        "clone",
        "alias",
        "detach",
        "roll",
        "flip",
        "t",
        "narrow",
        "repeat",
        "tile",
        "index",
        "index_select",
        "pixel_shuffle",
        "pixel_unshuffle",
        "view_as",
        "reshape_as",
        "expand_as",
        "movedim",
        "swapaxes",
        "mT",
        "mH",
        "adjoint",
        "numpy_T",
        "hsplit",
        "concat",
        "concatenate",
        "repeat_interleave",
        "rot90",
        "lift_fresh_copy",
        "diagonal",
        "channel_shuffle",
        "unfold",
        "tensor_split",
    ]
)
POINTWISE = frozenset(
    [
        "relu",
        "relu6",
        "gelu",
        "silu",
        "sigmoid",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "tanh",
        "exp",
        "exp2",
        "expm1",
        "sqrt",
        "rsqrt",
        "abs",
        "neg",
        "square",
        "log",
        "log2",
        "log1p",
        "clamp",
        "clamp_min",
        "clamp_max",
        "softplus",
        "mish",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "erf",
        "sin",
        "cos",
        "reciprocal",
        "round",
        "floor",
        "ceil",
        "sign",
        "logsigmoid",
        "dropout",
        "feature_dropout",
        "to",
        "type_as",
        "_to_copy",
        "float",
        "half",
        "pow",
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "maximum",
        "minimum",
        "where",
        "addcmul",
        "addcdiv",
        "lerp",
        "fmod",
        "remainder",
        "masked_fill",
        "logical_not",
        "bitwise_not",
        "logical_and",
        "logical_or",
        "eq",
        "ne",
        "gt",
        "lt",
        "ge",
        "le",
        "nan_to_num",
        "threshold",
        "hardshrink",
        "softsign",
        "tanhshrink",
        "true_divide",
        "multiply",
        "subtract",
    ]
)
SPATIAL = frozenset(
    [
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool2d",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_linear1d",
        "_upsample_nearest_exact2d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "lp_pool2d",
    ]
)
REDUCTIONS = frozenset(
    [
        "mean",
        "sum",
        "amax",
        "amin",
        "linalg_vector_norm",
        "norm",
        "var",
        "std",
        "logsumexp",
        "all",
        "any",
        "prod",
    ]
)
SUMS = frozenset(["sum", "linalg_vector_norm", "norm"])
"""Reductions to which a channel of zeros adds nothing; the others are taken over the channels that stay."""
WEIGHTED = frozenset(["conv1d", "conv2d", "conv3d", "linear"])
"""Operators whose second input is a weight."""
BALANCED = frozenset(["chunk", "split", "tensor_split"])
"""Cuts into equal parts, which stay equal only if every part loses as many channels."""
CREATIONS = frozenset(
    [
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_full",
    ]
)
IGNORED = frozenset(
    ["_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "_assert_async"]
)


def operator_name(node: torch.fx.Node) -> str:
    """An operator's name without its overload and without the mark of in-place forms."""
    packet = getattr(node.target, "overloadpacket", None)
    name = str(getattr(packet, "__name__", None) or getattr(node.target, "__name__", node.target))
    return name if name.startswith("_") and name.endswith("__") else name.rstrip("_")
