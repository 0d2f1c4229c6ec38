"""`cveff models`: what there is to choose from."""

from __future__ import annotations

import fnmatch
from typing import Annotated

import typer

from cveff.cli import options
from cveff.cli.options import examples, print_json, print_table


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(epilog=examples("cveff models", "cveff models mobilenet", "cveff models --filter 'resnet*'"))(
        models
    )


def models(
    text: Annotated[str | None, typer.Argument(help="Show the names that contain this.")] = None,
    pattern: Annotated[
        str | None, typer.Option("--filter", help="Show the names that match, as in a shell: 'vit*'.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List the zoo's models (with weights and measured figures) and the architectures (cveff's and timm's)."""
    from cveff import model_zoo
    from cveff.subject import architectures

    glob = pattern or f"*{text or ''}*"
    cards = [card for card in model_zoo.cards() if fnmatch.fnmatch(card.name, glob)]
    names = architectures(glob)
    if as_json:
        return print_json({"cards": [card.model_dump(mode="json") for card in cards], "architectures": names})
    if cards:
        print_table(
            "zoo (ready to deploy)",
            ("name", "architecture", "parameters", "data", "weights", "description"),
            [
                (
                    card.name,
                    card.architecture,
                    f"{card.parameters:,}",
                    card.data,
                    "here" if card.weights.available else "not installed",
                    card.description,
                )
                for card in cards
            ],
        )
    if text is None and pattern is None:
        typer.echo(
            f"and {len(names)} architectures to train: cveff models TEXT, cveff models --filter 'mobilenet*'"
        )
    elif names:
        typer.echo("\n".join(names))
    elif not cards:
        typer.echo(f"no model matches {pattern or text!r}", err=True)
    return None
