"""Batch norm over the images of all ranks, on any device (torch's own SyncBatchNorm needs a GPU), for every subclass of
torch's batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

_STATISTICS = ("running_mean", "running_var")


@contextmanager
def synchronized(module: nn.Module) -> Iterator[None]:
    """Within the block, batch norms in training mode normalise by the mean and variance over all ranks' images.

    Outputs, gradients and running statistics are those of one process with the whole batch, but for rounding. All
    ranks must call the network equally often.
    """
    handles = []
    # Innermost: hooks of activation checkpointing, which set statistics aside, are there first and end last.
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            handles.append(norm.register_forward_pre_hook(_normalise))
            handles.append(norm.register_forward_hook(_put_back, prepend=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sum(torch.autograd.Function):
    """The sum over all ranks; every rank's loss depends on it, so gradients are summed as well."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        value = value.clone()
        distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)
        return gradient


def _normalise(norm: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Normalise the input, and let the layer scale and shift it alone: in evaluation mode, with statistics that do
    nothing. So whatever a subclass does after normalising stays its own."""
    assert isinstance(norm, _BatchNorm)
    if not norm.training:
        return None
    (images, *others) = arguments
    values = images.float()
    axes = [axis for axis in range(values.ndim) if axis != 1]
    shape = [1, -1] + [1] * (values.ndim - 2)
    number = torch.full((1,), values.numel() / values.shape[1], device=values.device)
    sums = _Sum.apply(torch.cat([values.sum(axes), number]))
    count, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
    centred = values - mean.view(shape)
    variance = _Sum.apply((centred * centred).sum(axes)) / count
    kept = {name: norm._buffers[name] for name in _STATISTICS}
    object.__setattr__(norm, "_kept_statistics", kept)
    if norm.track_running_stats:
        with torch.no_grad():
            _track(norm, mean, variance * (count / (count - 1).clamp_min(1)))
    zeros = torch.zeros_like(mean.detach())
    norm._buffers.update(running_mean=zeros, running_var=zeros + (1 - norm.eps))
    norm.training = False
    return ((centred * torch.rsqrt(variance + norm.eps).view(shape)).to(images.dtype), *others)


def _track(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert (
        norm.num_batches_tracked is not None
        and norm.running_mean is not None
        and norm.running_var is not None
    )
    norm.num_batches_tracked.add_(1)
    weight = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), weight)


def _put_back(norm: nn.Module, _: Any, __: Any) -> None:
    kept = vars(norm).pop("_kept_statistics", None)
    if kept is not None:
        norm._buffers.update(kept)
        norm.training = True
