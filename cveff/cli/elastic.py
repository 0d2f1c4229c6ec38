"""`cveff elastic show`, `cveff elastic extract`: the networks inside an elastic one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cveff.cli import options
from cveff.cli.options import examples, milliseconds, percent, print_json, print_table
from cveff.console import working

if TYPE_CHECKING:
    from cveff.extraction import Extraction

app = typer.Typer(
    help="The networks inside an elastic one: what there is, and one of them as a plain model.",
    no_args_is_help=True,
    epilog=examples(
        "cveff elastic show runs/elastic",
        "cveff elastic extract runs/elastic --latency-ms 5 --out runs/small",
    ),
)


class Search(StrEnum):
    """How a sub-net is searched for."""

    evolution = "evolution"
    random = "random"


@app.command(epilog=examples("cveff elastic show runs/elastic"))
def show(
    checkpoint: Annotated[str, typer.Argument(help="An elastic model: a run's or a saved model's folder.")],
    as_json: options.Json = False,
) -> None:
    """Show what of an elastic model can be made smaller, and how small."""
    from cveff.edits import edit_to_json
    from cveff.extraction import elastic_space

    space = elastic_space(checkpoint)
    if as_json:
        return print_json(edit_to_json(space))
    rows: list[tuple[object, ...]] = [
        (
            "--width",
            ", ".join(f"{share:g}" for share in space.shares),
            f"{len(space.widths)} groups of channels",
        ),
        ("--depth", ", ".join(map(str, range(space.depth + 1))), f"{len(space.stages)} stages"),
        (
            "--kernel",
            ", ".join(map(str, space.sides)) or None,
            f"{len(space.kernels)} depthwise convolutions",
        ),
        ("--resolution", ", ".join(str(height) for height, _ in space.sizes), "height of images, in pixels"),
    ]
    return print_table(
        "each on its own" if space.apart else "one value for all", ("option", "values", "of"), rows
    )


@app.command(
    epilog=examples(
        "cveff elastic extract runs/elastic --latency-ms 5",
        "cveff elastic extract runs/elastic --latency-ms 5 --data photos/ --target edge-cpu --out runs/small",
        "cveff elastic extract runs/elastic --width 0.5 --depth 1 --resolution 160",
    )
)
def extract(
    checkpoint: Annotated[str, typer.Argument(help="An elastic model: a run's or a saved model's folder.")],
    latency_ms: Annotated[
        float | None,
        typer.Option("--latency-ms", help="The most accurate sub-net that takes no longer on the target."),
    ] = None,
    width: Annotated[
        float | None, typer.Option("--width", help="Or the one that keeps this share of all channels,")
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", help="as many blocks less in every stage,")] = None,
    kernel: Annotated[
        int | None, typer.Option("--kernel", help="depthwise kernels of no more than this side,")
    ] = None,
    resolution: Annotated[int | None, typer.Option("--resolution", help="and images of this height.")] = None,
    search: Annotated[Search, typer.Option("--search", help="How to look for it.")] = Search.evolution,
    population: Annotated[int, typer.Option("--population", help="Sub-nets of a generation.")] = 100,
    generations: Annotated[int, typer.Option("--generations", help="After the first, which is random.")] = 20,
    images: Annotated[
        int, typer.Option("--images", help="Validation images that sub-nets are compared on.")
    ] = 2048,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Data set, as for `cveff train`; by default what the run was trained on."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option("--target", help="Device profile that latencies are measured for (`cveff targets`)."),
    ] = "edge-cpu",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the result; by default runs/NAME-subnet.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result in --out.")
    ] = False,
    on_bad_image: options.OnBadImageAsTrained = None,
    seed: options.SeedAsTrained = None,
    device: options.Device = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Make one network of an elastic model a plain one, its batch norms re-estimated, ready for `cveff deploy`."""
    with working(quiet) as progress:
        from cveff.dynamic import ExtractSubNet
        from cveff.dynamic.search import Evolution
        from cveff.extraction import extract_checkpoint

        step = ExtractSubNet(
            latency_ms,
            width,
            depth,
            kernel,
            resolution,
            search.value,
            Evolution(population, generations),
            images,
        )
        made = extract_checkpoint(
            checkpoint,
            step,
            out=out,
            data=data,
            on_bad_image=None if on_bad_image is None else on_bad_image.value,
            target=target if latency_ms is not None else None,
            overwrite=overwrite,
            seed=seed,
            device=device,
            progress=progress,
        )
        for warning in made.warnings:
            progress.message(f"warning: {warning}")
    if as_json:
        return print_json(made.to_json())
    return show_extraction(made)


def show_extraction(made: Extraction) -> None:
    """What the sub-net is and what it is worth."""
    subnet, figures = made.subnet, made.figures
    height, width = subnet["size"]
    share = made.parameters / made.elastic_parameters
    rows: list[tuple[object, ...]] = [
        ("accuracy", percent(made.accuracy)),
        ("latency, measured", milliseconds(figures.get("extract/latency_ms"))),
        ("latency, predicted", milliseconds(figures.get("extract/predicted_ms"))),
        ("parameters", f"{made.parameters:,} ({100 * share:.0f}% of the whole network)"),
        ("images", f"{height}×{width}"),
        ("blocks left out", ", ".join(subnet["dropped"]) or None),
        ("model", made.out / "model"),
    ]
    print_table("", ("figure", "value"), rows)
