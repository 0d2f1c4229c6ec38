"""Recipes as text: a commented one to start from, and any recipe in full."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cveff.errors import CveffError, RecipeError
from cveff.files import write_text
from cveff.recipe import DeploySettings, Recipe, default_training, find_recipe
from cveff.schema import default_of, descriptions, kinds_of, nested

_WIDTH = 100


def commented(data: str, architecture: str | None = None) -> str:
    """A recipe on `data` that validates as it is, with a comment on every key.

    Keys at their default stand behind a `#`.
    """
    ready = find_recipe(data)
    if ready is not None:
        values = tomllib.loads(ready.read_text(encoding="utf-8"))
    else:
        values = {"data": {"source": data}, "train": _changed(default_training(data))}
    values = {"deploy": {"target": DeploySettings().target, "max_accuracy_drop": 1.0}} | values
    if architecture is not None:
        values["model"] = {**values.get("model", {}), "architecture": architecture}
    lines = [
        "# A recipe of cveff: `cveff train FILE` does all of it, `cveff recipe check FILE` only reads it.",
        "# A key behind a # has the value it has anyway.",
        "",
        *_table(Recipe, values, ()),
    ]
    return "\n".join(lines) + "\n"


def to_toml(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """Plain values as TOML: scalars first, then tables and arrays of tables. None is left out."""
    lines = [
        f"{key} = {literal(value)}"
        for key, value in values.items()
        if not _is_table(value) and value is not None
    ]
    text = "\n".join(lines) + "\n" if lines else ""
    for key, value in values.items():
        name = ".".join((*path, key))
        if isinstance(value, Mapping):
            inner = to_toml(value, (*path, key))
            text += f"\n[{name}]\n{inner}" if inner or not value else ""
        elif _is_table(value):
            text += "".join(f"\n[[{name}]]\n{to_toml(item, (*path, key))}" for item in value)
    return text


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet.

    Raises:
        CveffError: it exists.
    """
    if path.exists():
        raise CveffError(f"{path} exists already; give another file to --out, or remove it")
    write_text(path, text)


def _table(settings: type, values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """The keys of one table, then its inner tables."""
    texts, inner = descriptions(settings), nested(settings)
    keys = [item for item in dataclasses.fields(settings) if item.init]
    for item in keys:
        if item.name in inner or kinds_of(item):
            continue
        yield from textwrap.wrap(
            texts.get(item.name, ""), _WIDTH, initial_indent="# ", subsequent_indent="#   "
        )
        default = default_of(item)
        if item.name in values:
            yield f"{item.name} = {literal(values[item.name])}"
        else:
            yield f"# {item.name} = {'…' if default is None else literal(default)}"
    for item in keys:
        name = ".".join((*path, item.name))
        if item.name in inner:
            given = values.get(item.name)
            if given is None and default_of(item) is None:  # a table that changes something by being there
                yield ""
                yield f"# [{name}]  # {_summary(inner[item.name])}"
                continue
            yield ""
            yield from textwrap.wrap(
                texts.get(item.name, ""), _WIDTH, initial_indent="# ", subsequent_indent="# "
            )
            yield f"[{name}]"
            yield from _table(inner[item.name], given or {}, (*path, item.name))
        elif kinds_of(item):
            yield ""
            yield from textwrap.wrap(
                texts.get(item.name, ""), _WIDTH, initial_indent="# ", subsequent_indent="# "
            )
            for kind, step in kinds_of(item).items():
                yield f"# [[{name}]]  # {_summary(step)}"
                yield f'# kind = "{kind}"'


def _changed(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default."""
    changed = {}
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if value != default_of(item):
            changed[item.name] = _changed(value) if dataclasses.is_dataclass(value) else value
    return changed


def _summary(settings: type) -> str:
    return (settings.__doc__ or "").strip().splitlines()[0].rstrip(".")


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def literal(value: Any) -> str:
    """A TOML value."""
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{_key(key)} = {literal(item)}" for key, item in value.items()) + " }"
            if value
            else "{}"
        )
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(literal(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, Path)):
        return _quoted(str(value))
    raise RecipeError(f"{value!r} cannot be written as TOML")


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _quoted(key)


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but for the delete character; characters beyond ASCII stand as they are.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
