"""What heads of a ragged cache keep after a token, chosen and put together in place.

A cache whose sums of attention change with every token chooses anew at every token (Ge et al., "Model Tells You What to
Discard", arXiv:2310.01801, Algorithm 2), and drops hardly any: whole tensors of comparisons and sorted sums would take
longer than attention itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cveff.errors import KernelError
from cveff.kernels.build import library
from cveff.kernels.call import call

__all__ = ["can_run", "evict_tokens"]

SOURCE = Path(__file__).parent / "cpu.cpp"
RULE = ("evicts", "seen", "window", "heavy", "apart", "normalize")
"""The numbers of a rule."""


def can_run(keys: Tensor, values: Tensor, codes: Tensor, scores: Tensor | None) -> bool:
    """Whether these can be given to `evict_tokens`: they lie contiguously in memory, and the kernel could be built."""
    tensors = [tensor for tensor in (keys, values, codes, scores) if tensor is not None]
    return (
        all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
        and library(SOURCE) is not None
    )


def evict_tokens(
    rules: Tensor, keys: Tensor, values: Tensor, codes: Tensor, scores: Tensor | None, lengths: Tensor
) -> None:
    """Drop what the rules do not keep, in place; an evicted token's slot takes one of the last.

    Args:
        rules: (S, 6) int64, see `RULE`: whether it drops anything, the tokens seen so far, how many of the most recent
            and of those with the greatest sums are kept, whether the latter are chosen among those that are not
            recent, and whether sums are divided by the number of queries that could see the token.
        keys, values: (S, capacity, …) of any type.
        codes: (S, capacity) int32: a token's position, with bit 30 where it is never dropped.
        scores: (S, capacity) float32, sums of attention received; slots that become free are set to 0.
        lengths: (S,) int64, slots in use, from the first on; changed.

    Raises:
        KernelError: shapes or types do not fit, or there is no compiler (see `can_run`).
    """
    count, capacity = codes.shape
    kinds = (rules.dtype, codes.dtype, lengths.dtype, None if scores is None else scores.dtype)
    if kinds[:3] != (torch.int64, torch.int32, torch.int64) or kinds[3] not in (None, torch.float32):
        raise KernelError(
            f"rules, codes, lengths and scores are {kinds}; give int64, int32, int64 and float32"
        )
    shapes = {tuple(tensor.shape[:2]) for tensor in (keys, values, codes, scores) if tensor is not None}
    if shapes != {(count, capacity)} or rules.shape != (count, len(RULE)) or lengths.shape != (count,):
        raise KernelError(
            f"tensors of {sorted(shapes)} slots, {tuple(rules.shape)} rules and {tuple(lengths.shape)} lengths "
            "do not fit"
        )
    if count == 0 or capacity == 0:
        return
    if int(lengths.min()) < 0 or int(lengths.max()) > capacity:
        raise KernelError(f"a length is not within 0 to {capacity}: {lengths.tolist()}")
    compiled = library(SOURCE)
    if compiled is None or not can_run(keys, values, codes, scores):
        raise KernelError("the kernel cannot run here: ask can_run() first")
    key_bytes, value_bytes = (tensor[0, 0].numel() * tensor.element_size() for tensor in (keys, values))
    call(
        compiled.evict_tokens,
        *(count, capacity, rules.contiguous()),
        *(keys, key_bytes, values, value_bytes, codes, scores, lengths, torch.get_num_threads()),
    )
