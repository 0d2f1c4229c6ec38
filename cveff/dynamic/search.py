"""Searching a space of sub-nets for the best that a limit allows: by evolution, and at random to compare with.

Both ask for the score of as many different sub-nets, and draw them the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from cveff.dynamic.elastic_space import Levels
from cveff.errors import StepError

_TRIES = 50
"""Draws after which a space is taken to be searched through."""


@dataclass(frozen=True)
class Evolution:
    """Settings of the search, those of Cai et al., "Once-for-All" (ICLR 2020), section 3.4.

    Attributes:
        population: sub-nets of a generation.
        generations: after the first, which is random.
        mutation: chance of each dimension to be drawn anew.
        parents: share of a generation that the next one descends from.

    Raises:
        StepError: at construction, for a value out of range.
    """

    population: int = 100
    generations: int = 20
    mutation: float = 0.1
    parents: float = 0.25

    def __post_init__(self) -> None:
        _check("population", self.population, self.population >= 2, "2 or more sub-nets")
        _check("generations", self.generations, self.generations >= 0, "0 or more")
        _check("mutation", self.mutation, 0 < self.mutation <= 1, "a chance above 0, up to 1")
        _check("parents", self.parents, 0 < self.parents <= 1, "a share above 0, up to 1")

    @property
    def evaluations(self) -> int:
        """Sub-nets that are scored, where the space has so many."""
        return self.population * (1 + self.generations)


@dataclass
class Search:
    """A space, its limit and what was scored so far.

    Args:
        alternatives: levels that each dimension has; level 0 is the largest.
        score: of a sub-net; the larger the better.
        fits: whether a sub-net keeps to the limit.
        identity: what two level tuples that mean the same sub-net share.
        seed: of all draws.

    Attributes:
        scores: levels -> score, in the order they were asked for, one a sub-net.
    """

    alternatives: Levels
    score: Callable[[Levels], float]
    fits: Callable[[Levels], bool]
    identity: Callable[[Levels], Hashable] = field(default=lambda levels: levels)
    seed: int = 0

    def __post_init__(self) -> None:
        self.scores: dict[Levels, float] = {}
        self._seen: set[Hashable] = set()
        self._random = np.random.default_rng(self.seed)
        if not self.fits(self._smallest):
            raise StepError("not even the smallest sub-net keeps to the limit; raise it")

    def evolve(self, settings: Evolution) -> Levels:
        """The best sub-net of all generations."""
        for _ in range(settings.population):
            self._try(self._draw)
        for _ in range(settings.generations):
            parents = self.best(max(1, round(settings.parents * settings.population)))
            for _ in range(settings.population // 2):
                self._try(partial(self._mutated, parents, settings.mutation))
            for _ in range(settings.population - settings.population // 2):
                self._try(partial(self._crossed, parents))
        return self.best(1)[0]

    def at_random(self, evaluations: int) -> Levels:
        """The best of so many random sub-nets."""
        for _ in range(evaluations):
            self._try(self._draw)
        return self.best(1)[0]

    def best(self, count: int) -> list[Levels]:
        """The sub-nets with the highest scores, of equal ones the first."""
        return sorted(self.scores, key=self.scores.__getitem__, reverse=True)[:count]

    @property
    def _smallest(self) -> Levels:
        return tuple(count - 1 for count in self.alternatives)

    def _try(self, make: Callable[[], Levels]) -> None:
        """Score one sub-net that was not scored yet; a random one where `make` finds none."""
        for attempt in range(2 * _TRIES):
            levels = self._shrunk(make() if attempt < _TRIES else self._draw())
            key = self.identity(levels)
            if key not in self._seen:
                self._seen.add(key)
                self.scores[levels] = self.score(levels)
                return

    def _draw(self) -> Levels:
        return tuple(int(self._random.integers(count)) for count in self.alternatives)

    def _mutated(self, parents: list[Levels], chance: float) -> Levels:
        parent, fresh = self._one_of(parents), self._draw()
        chosen = self._random.random(len(parent)) < chance
        return tuple(new if change else old for old, new, change in zip(parent, fresh, chosen, strict=True))

    def _crossed(self, parents: list[Levels]) -> Levels:
        first, second = self._one_of(parents), self._one_of(parents)
        chosen = self._random.random(len(first)) < 0.5
        return tuple(b if other else a for a, b, other in zip(first, second, chosen, strict=True))

    def _one_of(self, parents: list[Levels]) -> Levels:
        return parents[int(self._random.integers(len(parents)))]

    def _shrunk(self, levels: Levels) -> Levels:
        """`levels`, or with as few random steps down from it as make it fit: rejection would find nothing near the
        least that a large space allows.
        """
        if self.fits(levels):
            return levels
        steps = [
            dimension
            for dimension, (level, count) in enumerate(zip(levels, self.alternatives, strict=True))
            for _ in range(count - 1 - level)
        ]
        self._random.shuffle(steps)
        too_few, enough = 0, len(steps)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            too_few, enough = (
                (too_few, middle) if self.fits(_down(levels, steps[:middle])) else (middle, enough)
            )
        return _down(levels, steps[:enough])


def _down(levels: Levels, steps: list[int]) -> Levels:
    counts = np.bincount(steps, minlength=len(levels))
    return tuple(int(level + more) for level, more in zip(levels, counts, strict=True))


def _check(name: str, value: object, holds: bool, wanted: str) -> None:
    if not holds:
        raise StepError(f"extract_subnet.{name} is {value!r}; give {wanted}")
