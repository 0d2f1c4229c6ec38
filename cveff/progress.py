"""How long work shows itself. Library code takes a `Progress`; only the command line draws bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Something that can follow a loop and show a line of text."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` while showing how far it got."""
        ...

    def message(self, text: str) -> None:
        """Show one line."""
        ...


class Silent:
    """A `Progress` that shows nothing: the default of library calls."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items`."""
        yield from items

    def message(self, text: str) -> None:
        """Ignore `text`."""
