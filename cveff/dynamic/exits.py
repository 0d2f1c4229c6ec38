"""`Exits`: heads behind blocks of a network, as an edit, and the network that has them; what all exits share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from cveff.compress.features import captured
from cveff.errors import CheckpointError
from cveff.train.objective import Objective

Pool = Literal["planes", "channels-last", "tokens", "class-token"]
"""How a block's output becomes one vector: the mean over positions of (N, C, H, W), (N, H, W, C) or (N, L, C), or the
first token."""

AFTER_EXITS = ("train", "distill", "early_exit", "glance_focus")
"""Steps that a network with exits takes; the last two say themselves that exits are made once."""


class ExitHead(nn.Module):
    """Pool, layer norm, linear: logits from a block's output.

    Args:
        pool: see `Pool`.
        width: channels of the block's output.
        prefix: tokens before the image's (class token, registers), which the mean of "tokens" leaves out.
    """

    def __init__(self, pool: Pool, width: int, num_classes: int, prefix: int = 0) -> None:
        super().__init__()
        self.pool, self.prefix = pool, prefix
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """features: the block's output -> (N, classes)."""
        return cast(Tensor, self.linear(self.norm(self._pooled(features))))

    def _pooled(self, features: Tensor) -> Tensor:
        if self.pool == "planes":
            return features.mean((2, 3))  # (N, C, H, W) -> (N, C)
        if self.pool == "channels-last":
            return features.mean((1, 2))  # (N, H, W, C) -> (N, C)
        if self.pool == "class-token":
            return features[:, 0]  # (N, L, C) -> (N, C)
        return features[:, self.prefix :].mean(1)  # (N, L, C) -> (N, C)


class NetworkWithExits(nn.Module, ABC):
    """A network that answers more than once on its way. Called, it gives its last answer; `answers` has all.

    Args:
        network: what was given exits.
        names: of the early exits, in the order they answer.
    """

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names
        self._kept: list[Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, C, H, W) float -> the last exit's logits (N, classes)."""
        *early, last = self.answers(images)
        if self._kept is not None:
            self._kept[:] = early
        return last

    @abstractmethod
    def answers(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits (N, classes) of every exit."""

    @contextmanager
    def keeping(self) -> Iterator[list[Tensor]]:
        """Within the block a call also computes the early exits, and leaves their logits in this list."""
        kept: list[Tensor] = []
        self._kept = kept
        try:
            yield kept
        finally:
            self._kept = None


class NetworkWithHeads(NetworkWithExits):
    """A network and heads behind its blocks; its last answer is the network's own.

    Args:
        network: (N, C, H, W) -> (N, classes).
        paths: of the modules of `network` whose outputs the heads read, in the order they run.
        heads: one a path.
    """

    def __init__(self, network: nn.Module, paths: tuple[str, ...], heads: nn.ModuleList) -> None:
        super().__init__(network, paths)
        self.heads = heads

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, C, H, W) float -> the network's logits (N, classes); heads are left out where none keeps them."""
        return cast(Tensor, self.network(images)) if self._kept is None else super().forward(images)

    def answers(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits (N, classes) of every exit, the network's own last."""
        with captured(self.network, self.names) as outputs:
            last = self.network(images)
        return (
            *(head(outputs[path]) for path, head in zip(self.names, self.heads, strict=True)),
            last,
        )


@dataclass(frozen=True)
class Exits:
    """Edit: heads behind some blocks. The network's own answer is unchanged.

    However the model is trained afterwards, the exits are trained with it.

    Attributes:
        paths: of the modules whose outputs the heads read, in the order they run.
        pools: how each output becomes a vector (`Pool`).
        widths: channels of each output.
        num_classes: of every head.
        prefix: tokens before those of the image.
        method, alpha, temperature: how exits are trained, as in `EarlyExit`.

    Raises:
        CheckpointError: at construction, for lists of different lengths.
    """

    paths: tuple[str, ...]
    pools: tuple[str, ...]
    widths: tuple[int, ...]
    num_classes: int
    prefix: int = 0
    method: str = "joint"
    alpha: float = 0.5
    temperature: float = 4.0
    kind: ClassVar[str] = "early_exit"

    def objection(self, kind: str) -> str | None:
        """Heads read what blocks give, so that a step that changes blocks would break them."""
        if kind in AFTER_EXITS:
            return None
        return f"{kind} comes after early_exit, whose heads read the blocks as they are; put early_exit behind it"

    def __post_init__(self) -> None:
        if not len(self.paths) == len(self.pools) == len(self.widths) >= 1:
            raise CheckpointError(
                f"early_exit has {len(self.paths)} paths, {len(self.pools)} pools and {len(self.widths)} widths; there "
                "must be one of each for every exit"
            )

    def apply(self, module: nn.Module) -> nn.Module:
        """`module` with fresh heads.

        Raises:
            CheckpointError: a path is no module of it.
        """
        names = {name for name, _ in module.named_modules()}
        missing = [path for path in self.paths if path not in names]
        if missing:
            raise CheckpointError(
                f"early_exit reads {missing[0]!r}, and the network has no such module; these exits are another model's"
            )
        heads = [
            ExitHead(cast(Pool, pool), width, self.num_classes, self.prefix)
            for pool, width in zip(self.pools, self.widths, strict=True)
        ]
        return NetworkWithHeads(module, self.paths, nn.ModuleList(heads)).train(module.training)

    def constrained(self, objective: Objective, module: nn.Module) -> Objective:
        """`objective` for the last exit, and the early exits' losses added."""
        from cveff.dynamic.exit_objective import ExitObjective

        return ExitObjective(objective, self)


def with_exits(module: nn.Module, name: str) -> NetworkWithExits:
    """`module`, which must have exits.

    Args:
        name: what to call it in the error.

    Raises:
        CheckpointError: it has none, or a later step changed it so that they are gone.
    """
    if not isinstance(module, NetworkWithExits):
        raise CheckpointError(
            f"{name} has no early exits, or a later step replaced them; apply EarlyExit or GlanceFocus last"
        )
    return module


def num_prefix_tokens(module: nn.Module) -> int:
    """Tokens before the image's, as timm counts them."""
    return int(cast(Any, getattr(module, "num_prefix_tokens", 0)))
