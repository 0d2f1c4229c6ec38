"""Write docs/cli.md from the command line's own declarations, and the table of keys in docs/recipe.md.

python tools/cli_reference.py            # write both pages
python tools/cli_reference.py --check    # exit 1 if a page is not what the code says
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from cveff.cli import app
from cveff.recipe import Recipe
from cveff.recipe_text import literal
from cveff.schema import default_of, descriptions, kinds_of, nested

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- keys: written by tools/cli_reference.py -->", "<!-- end of keys -->"
_HEAD = "| key | meaning | default |\n|---|---|---|"

INTRODUCTION = """# Command line

`cveff VERB SUBJECT --option value`. This page is generated from the code by `tools/cli_reference.py`.

- Results go to stdout; with `--json` there is one JSON value there and nothing else. Progress and errors go to stderr.
- Exit codes: 0; 2 for a mistake in what was asked, said in one line (and for a file that does not verify); 1 for a bug
  in cveff, with a traceback; 130 after Ctrl-C or a polite kill, with nothing half-written.
- `--debug`, anywhere, shows tracebacks and the libraries' own messages.
- `cveff --install-completion` sets up completion for your shell.
"""


def reference() -> str:
    """The whole page."""
    return INTRODUCTION + "".join(_pages(typer.main.get_command(app), "cveff"))


def recipe_keys() -> str:
    """A Markdown table of keys for every table of a recipe."""
    return "\n".join(_tables(Recipe, ()))


def _pages(command: Any, name: str) -> Iterator[str]:
    for verb, inner in getattr(command, "commands", {}).items():
        path = f"{name} {verb}"
        if hasattr(inner, "commands"):
            yield f"\n## {path}\n\n{_text(inner.help)}\n{_parameters(inner)}"
            if inner.invoke_without_command:
                yield f"\n```console\n{_examples(inner.epilog)}\n```\n"
            yield from _pages(inner, path)
        else:
            yield f"\n{'##' if name == 'cveff' else '###'} {path}\n\n{_text(inner.help)}\n{_parameters(inner)}"
            yield f"\n```console\n{_examples(inner.epilog)}\n```\n"


def _parameters(command: Any) -> str:
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        names = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
        if parameter.param_type_name == "argument":
            names = f"`{parameter.name.upper()}`{' …' if parameter.nargs == -1 else ''}"
        rows.append(f"| {names} | {_text(parameter.help)} | {_default(parameter)} |")
    return "\n| option | meaning | default |\n|---|---|---|\n" + "\n".join(rows) + "\n" if rows else ""


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = getattr(parameter.default, "value", parameter.default)
    return "" if value is None or value is False or value == () or callable(value) else f"`{value}`".lower()


def _examples(epilog: str | None) -> str:
    return "\n".join(line for line in (epilog or "").splitlines() if line.startswith("cveff "))


def _text(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _tables(settings: type, path: tuple[str, ...]) -> Iterator[str]:
    texts, inner = descriptions(settings), nested(settings)
    keys = [item for item in dataclasses.fields(settings) if item.init and item.name not in inner]
    plain = [item for item in keys if not kinds_of(item)]
    if path:
        yield f"\n### `[{'.'.join(path)}]`\n"
    yield _HEAD
    yield from (_row(item, texts[item.name]) for item in plain)
    for name, table in inner.items():
        yield from _tables(table, (*path, name))
    for item in keys:
        for kind, step in kinds_of(item).items():
            about = (step.__doc__ or "").split("Attributes:")[0]
            yield f'\n### `[[{item.name}]]` `kind = "{kind}"`\n\n{_text(about)}'
            if dataclasses.fields(step) and step not in inner.values():
                yield from ("", _HEAD, *_step_rows(step))


def _step_rows(step: type) -> Iterator[str]:
    """A step's own keys; a table within it is named, as its keys are listed elsewhere."""
    texts, inner = descriptions(step), nested(step)
    for item in dataclasses.fields(step):
        if item.name in inner:
            yield f"| `{item.name}` | {_text(texts[item.name])} | a table of `{inner[item.name].__name__}`'s keys |"
        else:
            yield _row(item, texts[item.name])


def _row(item: dataclasses.Field[Any], text: str) -> str:
    default = default_of(item)
    shown = (
        "required" if default is dataclasses.MISSING else "" if default is None else f"`{literal(default)}`"
    )
    return f"| `{item.name}` | {_text(text)} | {shown} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    parser.add_argument("pages", nargs="*", type=Path, help="only these pages (default: all)")
    options = parser.parse_args()
    recipe = (DOCS / "recipe.md").read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    pages = {
        DOCS / "cli.md": reference(),
        DOCS / "recipe.md": pattern.sub(lambda _: f"{BEGIN}\n\n{recipe_keys()}\n\n{END}", recipe),
    }
    wanted = {path.resolve() for path in options.pages} or set(pages)
    stale = [
        path
        for path, text in pages.items()
        if path in wanted and (not path.is_file() or path.read_text(encoding="utf-8") != text)
    ]
    for path in stale:
        if options.check:
            print(f"{path} is not what the code says; run python tools/cli_reference.py", file=sys.stderr)
        else:
            path.write_text(pages[path], encoding="utf-8")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
