"""`cveff targets`, `cveff targets show`: the devices that `--target` takes."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cveff.cli import options
from cveff.cli.options import examples, print_json, print_table

if TYPE_CHECKING:
    from cveff.target import Target

app = typer.Typer(epilog=examples("cveff targets", "cveff targets show rtx > mine.toml"))


@app.callback(invoke_without_command=True)
def targets(context: typer.Context, as_json: options.Json = False) -> None:
    """List the device profiles that come with cveff, and what this machine lacks to measure them."""
    if context.invoked_subcommand is not None:
        return None
    from cveff.target import load_target, obstacles, target_names

    found = [load_target(name) for name in target_names()]
    if as_json:
        return print_json([_json(target) for target in found])
    return print_table(
        "",
        ("target", "description", "engines and precisions", "this machine"),
        [
            (target.name, target.description, _engines(target), "; ".join(obstacles(target)) or "runs them")
            for target in found
        ],
    )


@app.command(epilog=examples("cveff targets show rtx", "cveff targets show mine.toml --json"))
def show(
    target: Annotated[str, typer.Argument(help="A profile's name, or a .toml file.")],
    as_json: options.Json = False,
) -> None:
    """Show a profile as TOML, defaults included: a file to change and to give to --target."""
    from cveff.target import load_target

    found = load_target(target)
    if as_json:
        return print_json(_json(found))
    return typer.echo(toml(found), nl=False)


def toml(target: Target) -> str:
    """A profile's text, which `load_target` reads as the same profile."""
    from cveff.recipe_text import literal

    def lines(settings: Any) -> list[str]:
        values = [(item.name, getattr(settings, item.name)) for item in fields(settings)]
        return [
            f"{key} = {literal(value)}"
            for key, value in values
            if value is not None and key not in ("candidates", "tensorrt")
        ]

    pairs = [f"  {literal(pair)}," for pair in target.candidates]
    return "\n".join(
        [*lines(target), "candidates = [", *pairs, "]", "", "[tensorrt]", *lines(target.tensorrt), ""]
    )


def _engines(target: Target) -> str:
    precisions = {
        engine: [precision for name, precision in target.candidates if name == engine]
        for engine in target.engines
    }
    return "\n".join(f"{engine}: {', '.join(names)}" for engine, names in precisions.items())


def _json(target: Target) -> dict[str, Any]:
    from cveff.target import obstacles

    return {**target.to_json(), "obstacles": obstacles(target)}
