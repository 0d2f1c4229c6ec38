"""`cveff recipe init | check | show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cveff.cli import options
from cveff.cli.options import examples, print_json

app = typer.Typer(
    help="Write, check and show recipes.",
    no_args_is_help=True,
    epilog=examples("cveff recipe init --data photos/"),
)

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key: --set train.epochs=5.")
]


@app.command(epilog=examples("cveff recipe init --data photos/ --model resnet18 --out recipe.toml"))
def init(
    data: Annotated[str, typer.Option("--data", help="Data set to put in it.")] = "digits",
    model: Annotated[str | None, typer.Option("--model", help="Architecture to put in it.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The file; never overwritten. - prints it.")] = Path(
        "recipe.toml"
    ),
) -> None:
    """Write a recipe with a comment on every key."""
    from cveff.recipe_text import commented, write_new

    text = commented(data, model)
    if str(out) == "-":
        return typer.echo(text, nl=False)
    write_new(out, text)
    return typer.echo(f"{out}: edit it, then: cveff train {out}")


@app.command(epilog=examples("cveff recipe check recipe.toml"))
def check(
    recipe: Annotated[str, typer.Argument(help="A .toml file, or the name of a recipe of the zoo.")],
    settings: Settings = None,
    as_json: options.Json = False,
) -> None:
    """Say whether a recipe is right, or what is wrong with it. Nothing is loaded or trained."""
    from cveff.recipe import parse_assignment, read_recipe

    checked = read_recipe(recipe, dict(parse_assignment(text) for text in settings or ()))
    if as_json:
        return print_json(checked.to_json())
    return typer.echo(f"{recipe} is a valid recipe")


@app.command(epilog=examples("cveff recipe show digits"))
def show(
    recipe: Annotated[
        str | None, typer.Argument(help="A file or a name; without it, the names there are.")
    ] = None,
    settings: Settings = None,
    as_json: options.Json = False,
) -> None:
    """Print a recipe with every default filled in."""
    from cveff.recipe import parse_assignment, read_recipe, recipe_names
    from cveff.recipe_text import to_toml

    if recipe is None:
        names = recipe_names()
        return print_json(names) if as_json else typer.echo("\n".join(names))
    values = read_recipe(recipe, dict(parse_assignment(text) for text in settings or ())).to_json()
    return print_json(values) if as_json else typer.echo(to_toml(values), nl=False)
