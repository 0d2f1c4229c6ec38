"""`cveff bench` and `cveff verify`: figures of a model, a file or a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cveff.cli import options
from cveff.cli.options import examples, milliseconds, percent, print_json, print_table, size
from cveff.console import working

if TYPE_CHECKING:
    from cveff.export.bench import Figures
    from cveff.export.verify import Verification
    from cveff.measure.parity import LayerParity


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
            {name: for_measuring(subject) for name, subject in _named(subjects)},
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


def _named(subjects: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, subject): a subject given twice is timed twice, which shows the noise."""
    for index, subject in enumerate(subjects):
        earlier = subjects[:index].count(subject)
        yield (f"{subject} #{earlier + 1}" if earlier else subject), subject


def verify(
    subject: Annotated[str, typer.Argument(help="A bundle, an .onnx or .xml file, or a saved model.")],
    data: options.OptionalData = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="The original: a saved model or a file. [a bundle's model.onnx]"),
    ] = None,
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(
            "--max-accuracy-drop", min=0, max=100, help="Points it may lose; by default the bundle's."
        ),
    ] = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> int:
    """Check hashes, accuracy against the claim, and agreement with the original, layer by layer.

    Exit code 2 where something is wrong.
    """
    with working(quiet) as progress:
        import cveff
        from cveff.subject import for_measuring

        verification = cveff.verify(
            for_measuring(subject),
            data=data,
            against=None if against is None else for_measuring(against),
            max_accuracy_drop=max_accuracy_drop,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json(verification.to_json())
    else:
        show_verification(verification)
    return 0 if verification.ok else 2


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


def show_verification(found: Verification) -> None:
    """What was checked, then what is wrong."""
    images = "" if found.num_images is None else f" of {found.num_images} images ({found.split})"
    rows: list[tuple[str, object]] = [
        ("subject", f"{found.subject}  {found.engine} {found.precision}"),
        ("compared with", found.reference),
        ("accuracy", found.accuracy is not None and f"{percent(found.accuracy)}{images}"),
        ("claimed accuracy", percent(found.claimed_accuracy)),
        ("original's accuracy", percent(found.reference_accuracy)),
        ("agreement", percent(found.agreement)),
        ("largest relative difference", _scientific(found.max_relative_difference)),
        ("first large difference", _layer(found.first_large_difference)),
        ("most error is made in", _layer(found.largest_rise)),
    ]
    print_table("", ("check", "found"), [row for row in rows if row[1]])
    for note in found.notes:
        typer.echo(f"note: {note}")
    for problem in found.problems:
        typer.echo(f"problem: {problem}")
    typer.echo("verified" if found.ok else "not verified")


def _layer(layer: LayerParity | None) -> str | None:
    if layer is None:
        return None
    return f"{layer.module or layer.name} ({layer.op}, {_scientific(layer.relative_difference)})"


def _scientific(value: float | None) -> str | None:
    return None if value is None else f"{value:.1e}"
