"""`Spread`: one network trained by the ranks of a process group, under DDP (Li et al., arXiv:2006.15704) or FSDP2
(Zhao et al., arXiv:2304.11277; per-parameter sharding)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cveff.data.dataset import Split
from cveff.errors import TrainingError
from cveff.log import NoLog
from cveff.model import Model
from cveff.progress import Silent
from cveff.steps import Run
from cveff.train.curriculum import is_file
from cveff.train.distributed import agree, decided, evaluation_part, group, in_order, total
from cveff.train.layers import repeated_blocks
from cveff.train.objective import CrossEntropy, Objective
from cveff.train.sharded import whole
from cveff.train.state import save_state
from cveff.train.sync_batch_norm import synchronized

if TYPE_CHECKING:
    from cveff.train.train import Train

Loss = Callable[[Tensor, Tensor], Tensor]


class Spread:
    """How the present process group, or one process alone, trains.

    Attributes:
        share: this process's place.
        is_sharded: every rank holds a part of each weight.
        writes: this process keeps the run's files and shows progress.

    Raises:
        TrainingError: settings that several ranks cannot follow.
    """

    def __init__(self, settings: Train, objective: Objective, device: torch.device) -> None:
        self.share = group()
        self.is_sharded = self.share.world > 1 and settings.distributed.strategy == "fsdp2"
        self.writes = self.share.rank == 0
        self._settings, self._device = settings, device
        if self.share.world > 1:
            _check(settings)
        if self.is_sharded:
            _check_sharded(settings, objective)

    def quiet(self, run: Run) -> Run:
        """`run`; without progress and log on ranks beside the first."""
        return run if self.writes else replace(run, progress=Silent(), log=NoLog())

    def require_images(self, count: int) -> None:
        """Refuse batches that leave a rank without an image for each part.

        Args:
            count: images of a batch.

        Raises:
            TrainingError: they do.
        """
        settings, world = self._settings, self.share.world
        smallest = self.share.smallest(count, settings.augmentation.mixes)
        if world > 1 and smallest < settings.accumulation:
            raise TrainingError(
                f"a batch of {count} images leaves {smallest} to one of {world} ranks, and train.accumulation is "
                f"{settings.accumulation}; give a larger train.batch_size, or fewer ranks"
            )

    def place(self, module: nn.Module) -> nn.Module:
        """Put a network on the device, with rank 0's weights on every rank."""
        # FSDP2 cuts rows of contiguous weights.
        layout = torch.contiguous_format if self.is_sharded else torch.channels_last
        module = module.to(self._device, memory_format=layout)  # type: ignore[call-overload]
        agree(module, self.share)
        return module

    def shard(self, *modules: nn.Module) -> None:
        """Under "fsdp2" leave every rank a part of the weights: blocks are gathered one by one, as they are needed.

        Raises:
            TrainingError: a weight without dimensions, which has no parts.
        """
        if not self.is_sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._device.type, (self.share.world,))
        for module in modules:
            for name, parameter in module.named_parameters():
                if parameter.ndim == 0:
                    raise TrainingError(
                        f"{name} is a single number, which fsdp2 cannot cut; use train.distributed.strategy = 'ddp'"
                    )
            for block in repeated_blocks(module).values():
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)

    def loss(self, objective: Objective, module: nn.Module, extra: nn.Module) -> Loss:
        """The objective's loss summed over a rank's images, whose gradients are averaged over ranks."""
        computed = _Loss(objective, module, extra)
        if self.share.world == 1 or self.is_sharded:
            return computed
        # Networks may skip layers, at random too; then a rank must not wait for a gradient that never comes.
        # Rank 0's statistics are given to all before they are used, see `validating`.
        return nn.parallel.DistributedDataParallel(
            computed, broadcast_buffers=False, find_unused_parameters=True
        )

    def parts(self, loss: Loss, images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """The parts a batch is computed in, each with the context of its forward and backward pass.

        As many on every rank; gradients are exchanged after the last one.
        """
        count = self._settings.accumulation
        if self.share.world == 1:
            pairs = list(zip(images.chunk(count), targets.chunk(count), strict=True))
        else:
            pairs = list(zip(images.tensor_split(count), targets.tensor_split(count), strict=True))
        for index, (part, answers) in enumerate(pairs):
            waits = index + 1 < len(pairs) and isinstance(loss, nn.parallel.DistributedDataParallel)
            yield part, answers, loss.no_sync() if waits else nullcontext()  # type: ignore[attr-defined]

    def batch_norms(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which batch norms see the whole batch, if they are to."""
        wanted = self.share.world > 1 and self._settings.distributed.sync_batch_norm
        return synchronized(module) if wanted else nullcontext()

    def validating(self, module: nn.Module) -> None:
        """Give every rank the same statistics, where each has kept its own."""
        if not self._settings.distributed.sync_batch_norm:
            agree(module, self.share, buffers_only=True)

    def validation_part(self, split: Split) -> Split:
        """The images of `split` that this rank scores."""
        return split if self.share.world == 1 else split.subset(evaluation_part(len(split), self.share))

    def gather(self, count: int) -> Callable[[np.ndarray], np.ndarray]:
        """What puts all ranks' results on a validation split of `count` images together."""
        return lambda values: in_order(values, count, self.share)

    def mean(self, losses: Sequence[Tensor]) -> float:
        """The mean of losses of which every rank has its part."""
        return float(total(torch.stack(list(losses)).mean(), self.share))

    def decided(self, is_due: bool) -> bool:
        """Whether to do what all ranks must do together: rank 0's clock says it."""
        return decided(is_due, self.share) if self.is_sharded else is_due

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Whole tensors of a network; all ranks ask together."""
        return whole(module.state_dict())  # type: ignore[no-any-return]

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Keep a training state: one file, or of a sharded network every rank's part beside it.

        Raises:
            CveffError: a file cannot be written.
        """
        if self.is_sharded:
            save_state(path, state, self.share)
        elif self.writes:
            save_state(path, state)

    def plain(self, model: Model, module: nn.Module) -> nn.Module:
        """`module`, or a network like it that is not sharded, to take the kept weights."""
        from cveff.model import build

        return build(model.spec).module if self.is_sharded else module


class _Loss(nn.Module):
    """An objective as a module, which is what DDP wraps: objectives look into networks as they please."""

    def __init__(self, objective: Objective, module: nn.Module, extra: nn.Module) -> None:
        super().__init__()
        self.network, self.extra = module, extra
        self._objective = objective

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return self._objective.loss(self.network, images, targets)


def _check(settings: Train) -> None:
    for name in ("budget", "grow", "offload_optimizer"):
        if getattr(settings, name):
            raise TrainingError(f"train.{name} is for one process; start without torchrun, or leave it out")
    metrics = list(settings.curriculum.metrics) if settings.curriculum else []
    metrics += [item.metric for item in (settings.selection, settings.importance) if item]
    for metric in metrics:
        if not is_file(metric):
            raise TrainingError(
                f"several ranks take difficulties from a file, not by measuring {metric!r}; measure them in one "
                "process (cveff.train.measure_difficulty) and name the file"
            )


def _check_sharded(settings: Train, objective: Objective) -> None:
    conflicts = {
        "precision = 'fp16'": settings.precision == "fp16",
        "optimizer = 'muon'": settings.optimizer == "muon",
        "mup_base_width": settings.mup_base_width is not None,
        "token_drop": settings.token_drop is not None,
        "resolution": settings.resolution is not None,
    }
    for name, conflict in conflicts.items():
        if conflict:
            raise TrainingError(f"train.{name} needs whole weights; use train.distributed.strategy = 'ddp'")
    if type(objective) is not CrossEntropy:
        raise TrainingError(
            f"{type(objective).__name__} looks into the network, which 'fsdp2' keeps in parts; use "
            "train.distributed.strategy = 'ddp'"
        )
