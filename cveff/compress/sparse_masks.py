"""Which weights to keep: pure functions of scores, and the schedule by which ever fewer are kept.

Weights are (out, in, …): those of a linear layer, or of a convolution with `in` channels a group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_two_of_four(scores: Tensor) -> Tensor:
    """The two largest of every four neighbours along the input channels (Mishra et al., arXiv:2104.08378).

    That is the pattern of NVIDIA's sparse tensor cores; of a convolution, for each output channel and each pixel of
    the kernel on its own.

    Args:
        scores: (out, in, …), in a multiple of 4.

    Returns:
        a mask like `scores`, true where a weight stays.
    """
    rows = scores.movedim(1, -1)  # (out, …, in)
    fours = rows.reshape(-1, 4)
    keep = torch.ones_like(fours, dtype=torch.bool)
    keep.scatter_(1, fours.argsort(dim=1, stable=True)[:, :2], False)
    return keep.view(rows.shape).movedim(-1, 1)


def keep_largest(scores: Tensor, sparsity: float, by_row: bool) -> Tensor:
    """All but the `sparsity` share of smallest scores, of the whole weight or of every output channel alike.

    Returns:
        a mask like `scores`, true where a weight stays; exactly `round(sparsity · count)` are false.
    """
    rows = scores.reshape(len(scores), -1) if by_row else scores.reshape(1, -1)
    dropped = round(sparsity * rows.shape[1])
    keep = torch.ones_like(rows, dtype=torch.bool)
    keep.scatter_(1, rows.topk(dropped, dim=1, largest=False).indices, False)
    return keep.view(scores.shape)


def cubic_sparsity(progress: float, final: float, initial: float = 0.0) -> float:
    """`s_f + (s_i - s_f) (1 - t)³` for `progress` t, at most 1 (Zhu & Gupta, arXiv:1710.01878, equation 1)."""
    return final + (initial - final) * (1 - min(1.0, progress)) ** 3


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at least two of every four neighbours along the input channels are zero."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight.movedim(1, -1).reshape(-1, 4) != 0).sum(dim=1) <= 2).all())


def zero_share(weight: Tensor) -> float:
    """Share of exact zeros."""
    return 1 - int(torch.count_nonzero(weight)) / weight.numel()
