"""Which rule says what an operator does to channels; see `ownership.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from cveff.compress.operators import CREATIONS, MOVES, POINTWISE, REDUCTIONS, SPATIAL
from cveff.compress.rule_moves import fold, move, pad, unfold
from cveff.compress.rule_norms import batch_norm, group_norm, layer_norm, prelu
from cveff.compress.rule_pointwise import create, glu, pointwise
from cveff.compress.rule_products import attention, matmul
from cveff.compress.rule_statistics import reduce, softmax, spatial
from cveff.compress.rule_weights import addmm, convolve, convolve_transposed, linear

if TYPE_CHECKING:
    from cveff.compress.ownership import Ownership

Rule = Callable[["Ownership", torch.fx.Node], Any]

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(MOVES, move),
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(SPATIAL, spatial),
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(CREATIONS, create),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], convolve),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], convolve_transposed),
    **dict.fromkeys(["batch_norm", "instance_norm"], batch_norm),
    **dict.fromkeys(["layer_norm", "rms_norm"], layer_norm),
    **dict.fromkeys(["matmul", "bmm", "mm"], matmul),
    **dict.fromkeys(["softmax", "log_softmax", "_softmax"], softmax),
    **dict.fromkeys(["pad", "constant_pad_nd"], pad),
    "im2col": unfold,
    "col2im": fold,
    "linear": linear,
    "addmm": addmm,
    "group_norm": group_norm,
    "scaled_dot_product_attention": attention,
    "glu": glu,
    "prelu": prelu,
}
"""An operator's name -> what it does to the owners of its inputs; the result is its value's owners."""
