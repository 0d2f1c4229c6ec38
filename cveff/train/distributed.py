"""Training by several processes: the settings, the process group from its first moment to its last, and what ranks say
to each other. Under `torchrun` every process is a rank; without it there is one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, distributed, nn

from cveff.data.share import Share
from cveff.errors import CveffError, TrainingError
from cveff.runtime.errors import first_line

_ROLL_CALL_SECONDS = 5.0


@dataclass(frozen=True)
class Distributed:
    """How several processes share a training run; without effect on one.

    Attributes:
        strategy: "ddp" keeps the whole network in every process, "fsdp2" a part of each weight, gradient and moment.
        sync_batch_norm: batch norms take their statistics over the whole batch, as one process would; off, each
            process takes those of its own images, which is faster and another training.
        timeout_minutes: how long a process waits for the others before it gives up.
    """

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    sync_batch_norm: bool = True
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.strategy not in ("ddp", "fsdp2"):
            raise TrainingError(f"distributed.strategy is {self.strategy!r}; give ddp or fsdp2")
        if self.timeout_minutes <= 0:
            raise TrainingError(
                f"distributed.timeout_minutes is {self.timeout_minutes!r}; give a positive number"
            )


def launched() -> Share:
    """This process's place among those `torchrun` started; rank 0 of 1 without it.

    Raises:
        TrainingError: the environment names a rank that is none.
    """
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        return Share(rank, world)
    except (ValueError, CveffError) as error:
        raise TrainingError(
            f"RANK is {os.environ.get('RANK')!r} and WORLD_SIZE {os.environ.get('WORLD_SIZE')!r}; start with "
            "torchrun, which sets both, or unset them"
        ) from error


@contextmanager
def joined(device: torch.device, settings: Distributed | None = None) -> Iterator[Share]:
    """Within the block the processes that `torchrun` started are one group: NCCL on GPUs, gloo on CPUs.

    One process alone needs no group, and has none. `Train` uses the group it finds.

    Args:
        device: where torch computes; on GPUs each process takes the one of its LOCAL_RANK.

    Raises:
        TrainingError: another rank stopped, which is named; or a machine has fewer GPUs than ranks.
    """
    share = launched()
    if share.world == 1:
        yield share
        return
    backend = "gloo"
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise TrainingError(
                f"rank {share.rank} is number {local} on this machine, which has {torch.cuda.device_count()} GPUs; "
                "give torchrun a smaller --nproc-per-node"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"  # short messages stay on the CPU: no GPU is waited for
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(minutes=(settings or Distributed()).timeout_minutes)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    # What an earlier group of these processes left in the store must not be taken for this one's.
    store = PrefixStore(f"cveff/{store.add(f'cveff/groups/{rank}', 1)}", store)
    _wait_for_all(PrefixStore("begin", store), share, timeout.total_seconds())
    group_store = PrefixStore("group", store)
    distributed.init_process_group(backend, store=group_store, rank=rank, world_size=world, timeout=timeout)
    try:
        yield share
        distributed.barrier()
    except (Exception, KeyboardInterrupt) as error:
        _raise_for_lost(error, PrefixStore("end", store), share)
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _wait_for_all(store: Any, share: Share, seconds: float) -> None:
    """Wait until every rank is there; in Python, as torch's own waiting could not be interrupted.

    Raises:
        TrainingError: one does not come.
    """
    store.set(str(share.rank), "here")
    end, missing = time.monotonic() + seconds, set(range(share.world))
    while missing := {rank for rank in missing if not store.check([str(rank)])}:
        if time.monotonic() > end:
            raise TrainingError(
                f"rank {', '.join(map(str, sorted(missing)))} of {share.world} did not come within {seconds:.0f} s; "
                "start all ranks together, or raise train.distributed.timeout_minutes"
            )
        time.sleep(0.05)


def _raise_for_lost(error: BaseException, store: Any, share: Share) -> None:
    """Say which rank is gone, where `error` only says that something no longer answers.

    Raises:
        TrainingError: it does.
    """
    own = not _is_about_others(error)
    try:
        store.set(str(share.rank), f"stopped: {first_line(error)}" if own else "waiting")
        if own and not isinstance(error, KeyboardInterrupt):
            return
        end, found = time.monotonic() + _ROLL_CALL_SECONDS, {share.rank: ""}
        while len(found) < share.world and time.monotonic() < end:
            for rank in set(range(share.world)) - found.keys():
                if store.check([str(rank)]):
                    found[rank] = store.get(str(rank)).decode("utf-8", "replace")
            time.sleep(0.05)
    except (RuntimeError, KeyboardInterrupt):  # the store went with the rank that held it
        found = {share.rank: ""}
    gone = [str(rank) for rank in range(share.world) if rank not in found]
    stopped = [f"rank {rank} {text}" for rank, text in sorted(found.items()) if text.startswith("stopped: ")]
    if isinstance(error, KeyboardInterrupt) and not gone and not stopped:
        return
    what = "; ".join(
        [*([f"rank {' and '.join(gone)} of {share.world} no longer answers"] if gone else []), *stopped]
    )
    what = what or f"the ranks lost each other ({first_line(error)})"
    raise TrainingError(
        f"{what}; rank {share.rank} stops too; start all ranks again with --resume to go on from the last state"
    ) from error


def _is_about_others(error: BaseException) -> bool:
    """Whether an error comes from a message to other ranks, and not from this rank's own work."""
    if isinstance(error, CveffError) or not isinstance(error, (RuntimeError, KeyboardInterrupt)):
        return False
    text = str(error).lower()
    marks = ("gloo", "nccl", "by peer", "timed out", "broken pipe", "store")
    is_torchs = isinstance(error, (distributed.DistError, KeyboardInterrupt))
    return is_torchs or any(mark in text for mark in marks)


def group() -> Share:
    """This process's place in the process group; rank 0 of 1 where there is none."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Share()
    return Share(distributed.get_rank(), distributed.get_world_size())


def total(value: Tensor, share: Share) -> Tensor:
    """The sum of a tensor over all ranks, the same everywhere; `value` itself where there is one."""
    if share.world > 1:
        value = value.clone()
        distributed.all_reduce(value)
    return value


def decided(is_due: bool, share: Share) -> bool:
    """What rank 0 says, for decisions that depend on a clock."""
    if share.world == 1:
        return is_due
    answer = torch.tensor([is_due], dtype=torch.uint8)
    distributed.broadcast(answer, src=0)
    return bool(answer)


@torch.no_grad()
def agree(module: nn.Module, share: Share, *, buffers_only: bool = False) -> None:
    """Give every rank rank 0's weights and buffers."""
    if share.world == 1:
        return
    for value in (*([] if buffers_only else module.parameters()), *module.buffers()):
        # A copy: collectives want memory that is contiguous, channels_last is not.
        held = value.contiguous()
        distributed.broadcast(held, src=0)
        value.copy_(held)


def evaluation_part(count: int, share: Share) -> np.ndarray:
    """Indices of a split of `count` that this rank scores, as many on every rank: the first ones come twice where
    `count` does not divide, as ranks that hold parts of a network have to call it equally often."""
    each = -(-count // share.world)
    return np.resize(np.arange(count), each * share.world)[share.rank :: share.world]


def in_order(values: np.ndarray, count: int, share: Share) -> np.ndarray:
    """What all ranks have for their `evaluation_part`, (count, ...) in the order of the split, on every rank."""
    if share.world == 1:
        return values
    own = torch.from_numpy(np.ascontiguousarray(values))
    parts = [torch.empty_like(own) for _ in range(share.world)]
    distributed.all_gather(parts, own)
    whole: np.ndarray = torch.stack(parts, dim=1).flatten(0, 1).numpy()
    return whole[:count]
