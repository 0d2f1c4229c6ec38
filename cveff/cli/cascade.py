"""`cveff cascade`: bundles become one, in which easy images leave early."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cveff.cli import options
from cveff.cli.options import examples, milliseconds, percent, print_json, print_table
from cveff.console import working

if TYPE_CHECKING:
    from cveff.export.deploy import Deployment


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        epilog=examples(
            "cveff cascade small.bundle large.bundle --data photos/ --out both.bundle",
            "cveff cascade small.bundle large.bundle --data photos/ --mean-latency 0.5 --out fast.bundle",
            "cveff cascade staged.bundle --data photos/ --accuracy-drop 0.3 --gate margin --out other.bundle",
        )
    )(cascade)


def cascade(
    bundles: Annotated[
        list[Path], typer.Argument(help="Bundles, fast to accurate; or one that has stages already.")
    ],
    data: Annotated[str, typer.Option("--data", help="Labelled images: thresholds are chosen on val.")],
    out: Annotated[Path, typer.Option("--out", help="The new bundle's folder.")],
    mean_latency: Annotated[
        float | None,
        typer.Option("--mean-latency", help="Largest mean time, as a share of the last bundle's alone."),
    ] = None,
    accuracy_drop: Annotated[
        float | None,
        typer.Option("--accuracy-drop", help="Most points lost against the last bundle; 0 by default."),
    ] = None,
    gate: Annotated[str, typer.Option("--gate", help="confidence, entropy or margin.")] = "confidence",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of every engine.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the data's split and the order of timing.")] = 0,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Compose bundles: an image goes on to the next only where the one before is not certain."""
    with working(quiet) as progress:
        from cveff.dynamic.thresholds import Goal
        from cveff.export.cascade import cascade as compose

        has_goal = mean_latency is not None or accuracy_drop is not None
        made = compose(
            list(bundles),
            data=data,
            out=out,
            exits=Goal(mean_latency, accuracy_drop) if has_goal else None,
            gate=gate,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    if as_json:
        return print_json(made.to_json())
    return show_stages(made)


def show_stages(deployment: Deployment) -> None:
    """A row a stage, then what the whole does."""
    manifest = deployment.manifest
    stages = manifest["stages"]
    left = stages["evaluation"]["exits"]
    print_table(
        "",
        ("stage", "threshold", "images that leave", "latency"),
        [
            (
                entry["stage"],
                "" if entry["threshold"] is None else f"{entry['threshold']:.4f}",
                percent(count / max(1, sum(left))),
                milliseconds(time),
            )
            for entry, count, time in zip(stages["files"], left, stages["latency_ms"], strict=True)
        ],
    )
    full = stages["full"]
    latencies = manifest["metrics"]["latencies"]
    rows: list[tuple[object, ...]] = [
        ("accuracy", percent(full["accuracy"]), percent(manifest["metrics"]["accuracy"]["deployed"]))
    ]
    rows += [
        (f"latency (batch {item['batch']})", milliseconds(item["full_median"]), milliseconds(item["median"]))
        for item in latencies
    ]
    rows += [("bundle", None, deployment.path), ("report", None, deployment.path / "report.html")]
    print_table("", ("figure", full["name"], "staged"), rows)
