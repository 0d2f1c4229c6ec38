"""`cveff train`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from cveff.cli import options
from cveff.cli.options import examples, percent, print_json, print_table
from cveff.console import working


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        epilog=examples(
            "cveff train digits",
            "cveff train fashion-mnist --budget 10m",
            "cveff train recipe.toml --set train.epochs=5 --out runs/short",
            "cveff train fashion-mnist --model vit_tiny_patch16_224 --assemble 4",
            "cveff train photos/ --model mobilenetv4_conv_small --target edge-cpu --resume",
            "torchrun --nproc-per-node 2 -m cveff train fashion-mnist",
        )
    )(train)


def train(
    recipe_or_data: Annotated[
        str,
        typer.Argument(
            help="A recipe (.toml file, or a name such as digits), or a data set to train on by defaults."
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Architecture, in place of the recipe's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; by default runs/NAME.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key: --set train.epochs=5."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=0, help="Train this long, with the warm-up in proportion.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="TIME",
            help="Train as long as fits, by the clock: 90s, 10m, 1h30m, from this command's start to the scored model.",
        ),
    ] = None,
    assemble: Annotated[
        int | None,
        typer.Option(
            "--assemble",
            min=1,
            metavar="K",
            help="Train K modules apart, then put them together and tune them.",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Deploy to this target (`cveff targets`).")
    ] = None,
    no_deploy: Annotated[bool, typer.Option("--no-deploy", help="Stop at the saved model.")] = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    on_bad_image: Annotated[
        options.BadImage | None, typer.Option("--on-bad-image", help="Same as --set data.on_bad_image=….")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Same as --set seed=….")] = None,
    device: options.Device = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Train a model by a recipe, do the recipe's steps, and deploy it if the recipe says so."""
    started = time.monotonic()
    with working(quiet) as progress:
        from cveff.pipeline import assist, run
        from cveff.recipe import parse_assignment, recipe_for, with_assembly
        from cveff.train.distributed import launched

        overrides = {
            "model.architecture": model,
            "deploy.target": target,
            "data.on_bad_image": on_bad_image and str(on_bad_image),
            "seed": seed,
        }
        overrides = {key: value for key, value in overrides.items() if value is not None}
        overrides |= dict(parse_assignment(text) for text in settings or ())
        recipe = recipe_for(recipe_or_data, overrides, epochs=epochs, budget=budget)
        recipe = recipe if assemble is None else with_assembly(recipe, assemble)
        out = out or Path("runs") / Path(recipe_or_data).stem
        if launched().rank:
            return assist(recipe, out=out, resume=resume, overwrite=overwrite, device=device)
        result = run(
            recipe,
            out=out,
            resume=resume,
            overwrite=overwrite,
            bundle=not no_deploy,
            device=device,
            tensorboard=tensorboard,
            progress=progress,
            started=started,
        )
    if as_json:
        return print_json(result.to_json())
    rows = [
        ("accuracy", f"{percent(result.accuracy)} of {result.count} images ({result.split})"),
        ("parameters", f"{result.num_parameters:,}"),
        ("model", result.model),
        *consumption(result.consumed),
    ]
    print_table("", ("figure", "value"), rows)
    if result.deployment is not None:
        from cveff.cli.deploy import show_deployment

        show_deployment(result.deployment)
    return None


def consumption(figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Rows of a table: what training consumed."""
    if not figures:
        return
    yield (
        "samples seen",
        f"{figures['samples']:,} ({figures['epochs']:.1f} epochs, {figures['steps']:,} steps)",
    )
    if "tokens" in figures:
        yield "tokens seen", f"{figures['tokens']:.3g} (summed over blocks)"
    yield "operations", f"{figures['flops']:.3g} FLOPs"
    share = percent(figures["evaluation_share"])
    yield "time", f"{figures['seconds']:.1f} s of training, {share} of it in validation"
    if "command_seconds" in figures:
        yield "budget", f"{figures['command_seconds']:.1f} s of {figures['budget_seconds']:.0f} s used"
