"""`cveff bench` and `cveff verify`: figures of a model, a file or a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cveff.cli import options
from cveff.cli.options import examples, milliseconds, percent, print_json, print_table, size
from cveff.console import working

if TYPE_CHECKING:
    from cveff.export.bench import Figures
    from cveff.export.verify import Verification


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(
        epilog=examples(
            "cveff bench runs/digits digits.onnx digits.bundle --batch 1 --batch 8 --threads 2",
        )
    )(bench)
    app.command(epilog=examples("cveff verify digits.bundle --data digits --against runs/digits"))(verify)


def bench(
    subjects: Annotated[
        list[str],
        typer.Argument(help="Saved models, runs, cards, .onnx or .xml files, bundles: timed interleaved."),
    ],
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Batch size; may be repeated. [1]")
    ] = None,
    threads: options.Threads = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Interleaved rounds.")] = None,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure fresh processes' memory.")
    ] = True,
    data: options.OptionalData = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Time models against each other, with memory, size and, where --data is given, accuracy."""
    with working(quiet) as progress:
        import cveff
        from cveff.subject import for_measuring

        figures = cveff.bench(
            [for_measuring(subject) for subject in subjects],
            batch=tuple(batch or (1,)),
            threads=threads,
            data=data,
            rounds=rounds,
            memory=memory,
            progress=progress,
        )
    if as_json:
        return print_json([entry.to_json() for entry in figures])
    return show_figures(figures)


def verify(
    subject: Annotated[str, typer.Argument(help="A bundle, an .onnx or .xml file, or a saved model.")],
    data: Annotated[str, typer.Option("--data", help="Data set: a name, a folder, or shards.")],
    against: Annotated[
        str | None, typer.Option("--against", help="A saved model or file to compare with, layer by layer.")
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Check a file's hashes, its accuracy, and its agreement with the model it came from."""
    with working(quiet) as progress:
        import cveff
        from cveff.subject import for_measuring

        reference = None if against is None else for_measuring(against)
        verification = cveff.verify(for_measuring(subject), data=data, against=reference, progress=progress)
    if as_json:
        return print_json(verification.to_json())
    return show_verification(verification)


def show_figures(figures: Sequence[Figures]) -> None:
    """One row a subject and batch size."""
    print_table(
        "",
        (
            "model",
            "engine",
            "batch",
            "threads",
            "median",
            "p90",
            "images/s",
            "speed-up",
            "size",
            "memory",
            "accuracy",
        ),
        [
            (
                entry.name,
                f"{entry.engine} {entry.precision}".strip(),
                entry.batch,
                entry.threads,
                milliseconds(entry.median_ms),
                milliseconds(entry.p90),
                f"{entry.throughput:,.0f}",
                f"{entry.speedup:.2f}×",
                size(entry.size_bytes),
                size(entry.peak_rss_bytes),
                percent(entry.accuracy),
            )
            for entry in figures
        ],
    )
