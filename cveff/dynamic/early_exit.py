"""`EarlyExit`: heads inside a network, so that easy images can leave it early."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from cveff.dynamic.exit_objective import Method, check_settings
from cveff.dynamic.exit_points import choose, exit_points, named
from cveff.dynamic.exits import Exits, NetworkWithExits, num_prefix_tokens
from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.steps import Run
from cveff.train import Train
from cveff.train.loop import fit


def default_training() -> Train:
    """How networks with exits are trained unless told otherwise."""
    return Train(epochs=20, batch_size=64, optimizer="adamw", learning_rate=1e-3, weight_decay=0.05)


@dataclass(frozen=True)
class EarlyExit:
    """Put heads behind blocks and train them together with the network.

    A head is a pool as the network's own (the class token, or the mean over positions), a layer norm and a linear
    layer. The model answers as before; `cveff.deploy` makes a staged bundle of it, in which images leave where they
    are certain.

    Attributes:
        exits: paths of the blocks to leave behind, such as ("layer2", "layer3"); by default those nearest to a quarter,
            a half and three quarters of the multiply-accumulate operations.
        method: "joint": the sum of the exits' cross-entropies, with equal weights (MSDNet: Huang et al., ICLR 2018,
            section 4). "distill": early exits also imitate the last (Zhang et al., ICCV 2019).
        alpha, temperature: of "distill": weight of the imitation, and what logits are divided by.
        train: how to train; None leaves the heads random, for a training step that follows.

    Unsupported: networks that `torch.export` cannot trace, and steps other than training behind this one: pruning,
    factorising and quantizing come before or not at all.

    Raises:
        StepError: at construction, for a value out of range.
    """

    exits: tuple[str, ...] = ()
    method: Method = "joint"
    alpha: float = 0.5
    temperature: float = 4.0
    train: Train | None = field(default_factory=default_training)

    kind: ClassVar[str] = "early_exit"
    requires: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_settings(self.kind, self)
        if len(set(self.exits)) != len(self.exits):
            raise StepError(f"early_exit.exits names a block twice: {', '.join(self.exits)}; name each once")

    def check_run(self, run: Run) -> None:
        """Refuse to train without images.

        Raises:
            StepError: there are none.
        """
        if self.train is not None and self.train.epochs and (run.data is None or run.data.train is None):
            raise StepError(
                "EarlyExit trains its heads, which needs data; pass data=… with a training split, or train=None"
            )

    def __call__(self, model: Model, run: Run) -> Model:
        """Choose the blocks, add the heads and train.

        Raises:
            StepError: a named block does not exist or cannot be left, the network has exits already, or has no block
                that it could be left behind.
            TrainingError, CheckpointError: as `Train`.
        """
        self.check_run(run)
        spec, module = model.spec, model.module
        if isinstance(module, NetworkWithExits):
            raise StepError(f"{spec.architecture} has early exits already; start from the model without them")
        points = (
            named(module, spec.input, self.exits) if self.exits else choose(exit_points(module, spec.input))
        )
        if not points:
            raise StepError(
                f"{spec.architecture} has no block through which everything behind it sees the image, so it cannot be "
                "left early; name blocks with exits=…, or make a cascade of two models"
            )
        run.progress.message(
            "exits behind "
            + ", ".join(f"{point.path} ({100 * point.share:.0f}% of MACs)" for point in points)
        )
        edit = Exits(
            paths=tuple(point.path for point in points),
            pools=tuple(point.pool for point in points),
            widths=tuple(point.width for point in points),
            num_classes=len(spec.labels),
            prefix=num_prefix_tokens(module),
            method=self.method,
            alpha=self.alpha,
            temperature=self.temperature,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            made = with_module(model, edit.apply(module), edit)
        return made if self.train is None else fit(made, self.train, run)
