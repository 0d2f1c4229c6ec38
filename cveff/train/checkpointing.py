"""Activation checkpointing: keep each block's input, and compute the rest again in the backward pass
(Chen et al., arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cveff.errors import TrainingError
from cveff.train.layers import repeated_blocks

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def checkpointed(module: nn.Module) -> Iterator[None]:
    """Within the block, `module` keeps the inputs of its blocks only; its outputs and gradients stay the same.

    timm's own checkpointing is used where the network has it, else the members of its lists are checkpointed.
    Running statistics of batch norms are updated once a step, as without it.

    Raises:
        TrainingError: the network has neither.
    """
    with ExitStack() as stack:
        timms = next((part for part in module.modules() if _set_timms(part, True)), None)
        if timms is not None:
            stack.callback(_set_timms, timms, False)
        else:
            blocks = repeated_blocks(module)
            if not blocks:
                raise TrainingError(
                    f"train.checkpoint_activations: {type(module).__name__} has neither set_grad_checkpointing nor a "
                    "list of blocks; turn it off"
                )
            for block in blocks.values():
                stack.callback(_wrap(block))
        for norm in module.modules():
            if isinstance(norm, _BatchNorm) and norm.track_running_stats:
                before = norm.register_forward_pre_hook(_set_statistics_aside)
                # A recomputation that has all it needs stops by an exception.
                after = norm.register_forward_hook(_put_statistics_back, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
        yield


def _set_timms(module: nn.Module, enable: bool) -> bool:
    """Whether the network took timm's switch."""
    switch = getattr(module, "set_grad_checkpointing", None)
    if switch is None:
        return False
    try:
        switch(enable)
    except (AssertionError, NotImplementedError):  # how timm's networks say that they cannot
        return False
    return True


def _wrap(block: nn.Module) -> Callable[[], None]:
    """Checkpoint a block's calls; the function that undoes it."""
    own = vars(block).get("forward")
    forward = block.forward

    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    def undo() -> None:
        if own is None:
            del block.forward
        else:
            block.forward = own

    block.forward = run  # type: ignore[method-assign]
    return undo


def _is_recomputing() -> bool:
    # torch.utils.checkpoint asks the same way whether it runs within a backward pass.
    return bool(torch._C._current_graph_task_id() != -1)


def _set_statistics_aside(norm: nn.Module, _: Any) -> None:
    if not _is_recomputing():
        return
    # Copies, not writing back: autograd saved the buffers and would find them changed.
    kept = {name: norm._buffers[name] for name in _STATISTICS}
    object.__setattr__(norm, "_set_aside", kept)
    for name, value in kept.items():
        norm._buffers[name] = None if value is None else value.clone()


def _put_statistics_back(norm: nn.Module, _: Any, __: Any) -> None:
    kept = vars(norm).pop("_set_aside", None)
    if kept is not None:
        norm._buffers.update(kept)
