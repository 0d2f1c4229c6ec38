"""Optimizer state in 8 bits, block-wise, with bitsandbytes' dynamic map (Dettmers et al., arXiv:2110.02861).

256 values share one float32 scale, so a value takes 1 + 4/256 bytes. Of second moments ("…_sq") the square root is
kept: the map reaches down to 3e-7 of a block's largest value, too little for squares. Extra: bitsandbytes.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from cveff.errors import MissingDependencyError

BLOCK = 256
MIN_ELEMENTS = 4096
"""Smaller tensors stay as they are: there is little to save (bitsandbytes' own limit)."""
SCALE = "_scale"


def require_library() -> Any:
    """bitsandbytes' functions.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise MissingDependencyError(
            "state_bits 8 needs bitsandbytes; pip install 'cveff[bitsandbytes]', or use state_bits 32"
        ) from error
    return functional


def read(state: MutableMapping[str, Any], name: str, like: Tensor, bits: int) -> Tensor:
    """The moment `name`, of `like`'s shape, to be changed in place and handed to `write`; zeros at first.

    Args:
        bits: 32 keeps it in `like`'s dtype, 8 in blocks of 256, unless it has under 4096 elements.
    """
    if name not in state:
        if bits == 32 or like.numel() < MIN_ELEMENTS:
            # Of `like`'s strides when it is a whole parameter's gradient, as torch's optimizers do.
            state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
        else:
            return torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
    if name + SCALE not in state:
        return state[name]
    functional = require_library()
    value: Tensor = functional.dequantize_blockwise(
        state[name], absmax=state[name + SCALE], code=_map(functional, name, like.device), blocksize=BLOCK
    )
    return value.square_() if _is_square(name) else value


def write(state: MutableMapping[str, Any], name: str, value: Tensor) -> None:
    """Keep the moment that `read` gave, in the form it had."""
    if state.get(name) is value:
        return
    functional = require_library()
    codes, quantized = functional.quantize_blockwise(
        value.sqrt() if _is_square(name) else value,
        code=_map(functional, name, value.device),
        blocksize=BLOCK,
    )
    state[name], state[name + SCALE] = codes, quantized.absmax


def _map(functional: Any, name: str, device: torch.device) -> Tensor:
    """The 256 values: of both signs, or for squares of one."""
    return functional.create_dynamic_map(signed=not _is_square(name)).to(device)


def _is_square(name: str) -> bool:
    return name.endswith("_sq")
