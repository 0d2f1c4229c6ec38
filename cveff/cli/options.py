"""Options that several verbs share, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


class BadImage(StrEnum):
    """What to do with a file that is not a readable image."""

    error = "error"
    skip = "skip"


class Channels(StrEnum):
    """Channels of a model's input."""

    grey = "1"
    colour = "3"


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
OptionalData = Annotated[
    str | None,
    typer.Option("--data", help="Data set: a name (digits, fashion-mnist, …), a folder, or shards."),
]
OnBadImage = Annotated[
    BadImage,
    typer.Option("--on-bad-image", help="Unreadable image files: stop at the first, or skip and count them."),
]
OnBadImageAsTrained = Annotated[
    BadImage | None,
    typer.Option("--on-bad-image", help="Unreadable image files: error or skip; by default as in training."),
]
SeedAsTrained = Annotated[
    int | None, typer.Option("--seed", min=0, help="By default that of the training, for the same split.")
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda; by default a GPU if there is one.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="All randomness derives from it.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads of the engine; by default every core you may use."),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="A .safetensors or .pth state dict for an architecture given by name."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue a run that stopped; begin where there is none.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Remove an earlier run in --out and begin again.")
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", min=1, help="Side of the input in pixels, for an architecture by name."),
]
ChannelsOption = Annotated[
    Channels | None, typer.Option("--channels", help="1 (grey) or 3 (RGB), for an architecture by name.")
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", help="A text file with one class name a line, for an architecture by name."),
]


def number(channels: Channels | None) -> Literal[1, 3] | None:
    """What the library takes."""
    return None if channels is None else 1 if channels is Channels.grey else 3


def examples(*commands: str) -> str:
    """An epilog that shows commands, one a line."""
    return "\n\n".join(("[bold]Examples[/bold]" if len(commands) > 1 else "[bold]Example[/bold]", *commands))


def print_json(value: Any) -> None:
    """Print one JSON value on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout; "–" stands for None."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A pipe has no width; cutting cells at 80 columns would lose text there.
    console = Console(width=None if Console().is_terminal else 200)
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("–" if cell is None else escape(str(cell)) for cell in row))
    console.print(table)


def percent(share: float | None) -> str | None:
    """0.9312 as "93.12%"."""
    return None if share is None else f"{100 * share:.2f}%"


def milliseconds(value: float | None) -> str | None:
    """A latency with three significant digits."""
    return None if value is None else f"{value:.3g} ms"


def size(num_bytes: float | None) -> str | None:
    """1_234_567 as "1.23 MB"."""
    if num_bytes is None:
        return None
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"
