"""A training run goes on with a larger network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cveff.model import Model
from cveff.train.growth.carry import carry_optimizer
from cveff.train.optimizers import ScheduledOptimizers

if TYPE_CHECKING:
    from cveff.train.loop import Trainer


def grow(trainer: Trainer) -> None:
    """Put the next, larger network in the place of the trainer's, with weights, averages and moments carried over."""
    model, optimizer, average = trainer.model, trainer.optimizer, trainer.average
    grown = trainer.growth.grow(model, trainer.step)
    trainer.take(grown.model)
    assert isinstance(optimizer, ScheduledOptimizers) and isinstance(trainer.optimizer, ScheduledOptimizers)
    carry_optimizer(optimizer, trainer.optimizer, (model.module, trainer.module), grown.placement)
    if average and trainer.average:
        grown.carry(Model(model.spec, average.module), trainer.average.module)
    trainer.mask()
    trainer.module.train()
    trainer.run.log.write(trainer.step, {"growth/difference": grown.difference})
    trainer.run.progress.message(
        f"grown before step {trainer.step} to {trainer.model.num_parameters:,} parameters; outputs differ by "
        f"{grown.difference:.1g}"
    )
