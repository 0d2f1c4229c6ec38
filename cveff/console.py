"""What a person at a terminal sees: progress bars and log lines, all on stderr, so that stdout holds results only."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, TypeVar

from cveff.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

T = TypeVar("T")

_NOISY = ("nncf", "openvino", "torch.onnx", "onnxscript", "onnx_ir", "onnxslim", "timm", "matplotlib", "PIL")


class Bars:
    """A `cveff.progress.Progress` drawn by rich: a bar with the time that is left for each loop, lines above them.

    Where stderr is no terminal no bars are drawn: each loop is announced by one line.
    """

    def __init__(self, rich: RichProgress) -> None:
        self._rich = rich

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items`, advancing a bar after each."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        if not self._rich.console.is_terminal:
            self.message(description)
        task = self._rich.add_task(description, total=total)
        try:
            for item in items:
                yield item
                self._rich.advance(task)
        finally:
            self._rich.remove_task(task)

    def message(self, text: str) -> None:
        """Print one line above the bars."""
        self._rich.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def working(quiet: bool = False) -> Iterator[Progress]:
    """Progress on stderr while the block runs. What libraries print to stdout meanwhile goes to stderr too.

    Args:
        quiet: show nothing.
    """
    if quiet:
        with redirect_stdout(sys.stderr):
            yield Silent()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    rich = Progress(
        *columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal
    )
    with rich, redirect_stdout(sys.stderr):
        yield Bars(rich)


def configure_logging(debug: bool = False) -> None:
    """Send log lines to stderr: warnings of ours and errors of the libraries below; everything with `debug`."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if debug:
        return
    warnings.simplefilter("ignore")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
