"""Which network gives which stage: the most alike where they meet, within a limit on size or operations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cveff.errors import StepError
from cveff.train.stitching.layout import Layout, are_same_tokens

MOST = 1_000_000
"""Assemblies that are compared one by one."""


@dataclass(frozen=True)
class Parent:
    """What choosing knows of a network.

    Attributes:
        cuts: paths of the modules that its stages but the last end with.
        layouts: of what these give.
        parameters: of each stage; one more than cuts.
        macs: multiply-accumulate operations of each stage, for one image.
    """

    cuts: tuple[str, ...]
    layouts: tuple[Layout, ...]
    parameters: tuple[int, ...]
    macs: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """An assembly.

    Attributes:
        use: index of the network that gives each stage.
        similarity: product over joints of the linear CKA of the two networks' features there.
        parameters, macs: of the assembled network, adapters included.
    """

    use: tuple[int, ...]
    similarity: float
    parameters: int
    macs: int

    @property
    def joints(self) -> tuple[int, ...]:
        """Stages that another network gives than the stage before."""
        return tuple(index for index in range(1, len(self.use)) if self.use[index] != self.use[index - 1])


Similarity = Sequence[Sequence[Sequence[float]]]
"""By cut, network in front, network behind."""


def assess(use: Sequence[int], parents: Sequence[Parent], similarity: Similarity) -> Choice:
    """What an assembly would cost, and how well it fits."""
    parameters = sum(parents[network].parameters[stage] for stage, network in enumerate(use))
    macs = sum(parents[network].macs[stage] for stage, network in enumerate(use))
    alike = 1.0
    for stage in range(1, len(use)):
        front, back = use[stage - 1], use[stage]
        if front == back:
            continue
        source, target = parents[front].layouts[stage - 1], parents[back].layouts[stage - 1]
        operations, weights = adapter_cost(source, target)
        macs, parameters = macs + operations, parameters + weights
        alike *= similarity[stage - 1][front][back]
    return Choice(tuple(use), alike, parameters, macs)


def adapter_cost(source: Layout, target: Layout) -> tuple[int, int]:
    """Multiply-accumulate operations and parameters of an adapter, its batch norm's two vectors included."""
    weights = source.channels * target.channels
    positions = target.height * target.width
    same_tokens = are_same_tokens(source, target)
    positions += target.prefix if same_tokens else 0
    constants = 0 if same_tokens else target.prefix * target.channels
    return weights * positions, weights + 2 * target.channels + constants


def choose(
    parents: Sequence[Parent],
    similarity: Similarity,
    max_parameters: int | None = None,
    max_macs: int | None = None,
) -> Choice:
    """The assembly of two networks or more that is most alike at its joints; of equals the cheapest.

    Raises:
        StepError: no assembly is within the limits, which says the least that can be reached; or there are too many.
    """
    stages = len(parents[0].parameters)
    if len(parents) ** stages > MOST:
        raise StepError(
            f"{len(parents)} models of {stages} stages make {len(parents) ** stages:,} assemblies; give fewer models "
            "or stages"
        )
    every = [
        assess(use, parents, similarity)
        for use in itertools.product(range(len(parents)), repeat=stages)
        if len(set(use)) > 1
    ]
    most_parameters = math.inf if max_parameters is None else max_parameters
    most_macs = math.inf if max_macs is None else max_macs
    small = [item for item in every if item.parameters <= most_parameters]
    fitting = [item for item in small if item.macs <= most_macs]
    if fitting:
        return max(fitting, key=lambda item: (item.similarity, -item.macs, -item.parameters))
    if not small:
        least = min(item.parameters for item in every)
        raise StepError(
            f"assemble.max_parameters is {max_parameters:,}, and no assembly has fewer than {least:,}; give at "
            "least that, or smaller models"
        )
    least = min(item.macs for item in small)
    among = "" if max_parameters is None else f" of at most {max_parameters:,} parameters"
    raise StepError(
        f"assemble.max_macs is {max_macs:,}, and no assembly{among} has fewer than {least:,}; give at least that, or "
        "smaller models"
    )
