"""Settings are frozen dataclasses; this turns TOML tables into them and every mistake into one line.

pydantic does the checking: each dataclass becomes a strict model that refuses unknown keys. An error names the
key's path, the value and what was expected: `digits.toml: train.epochs: 'ten' is not an integer`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from cveff.errors import CveffError, RecipeError

T = TypeVar("T")
Kinds = Mapping[str, type]
"""Name of each member of a union, as `kind = "…"` in a table."""

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "path_type": "a path in quotes",
    "tuple_type": "an array",
    "list_type": "an array",
    "dict_type": "a table",
    "mapping_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "none_required": "",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def parse(settings: type[T], values: Mapping[str, Any], source: str) -> T:
    """Build `settings`, a dataclass, from plain TOML or JSON values.

    Nested dataclasses are tables. A field whose metadata holds `{"kinds": callable}` is a table, or an array of
    tables, with a `kind` that picks the dataclass.

    Args:
        source: what to call the values in an error, usually the file's name.

    Raises:
        RecipeError: unknown key, wrong type, missing key, or a value its dataclass refuses.
    """
    try:
        # JSON rather than Python input: there, strict pydantic takes an array for a tuple and a string for a path.
        checked = _section(settings).model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise RecipeError(f"{source}: {_first_line(settings, values, error)}") from None
    return typing.cast(T, _build(settings, checked, source, ()))


def descriptions(settings: type) -> dict[str, str]:
    """Each field's text from the "Attributes:" part of a dataclass's docstring, as one line."""
    _, _, text = (settings.__doc__ or "").partition("Attributes:")
    found: dict[str, str] = {}
    names: list[str] = []
    indent = ""
    for line in text.splitlines():
        entry = re.match(r"^(\s*)([\w, ]+):\s+(.*)$", line)
        if entry and (not indent or entry[1] == indent):
            indent, names = entry[1], [name.strip() for name in entry[2].split(",")]
            found |= dict.fromkeys(names, entry[3].strip())
        elif line.strip() and names and len(line) - len(line.lstrip()) > len(indent):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        elif line.strip() and names:
            break
    return {name: text.rstrip(".") for name, text in found.items()}


def nested(settings: type) -> dict[str, type]:
    """Fields of a dataclass that are themselves dataclasses (also when optional)."""
    found = {}
    hints = typing.get_type_hints(settings)
    for item in dataclasses.fields(settings):
        if typing.get_origin(hints[item.name]) is tuple:
            continue
        for hint in (hints[item.name], *typing.get_args(hints[item.name])):
            if dataclasses.is_dataclass(hint):
                found[item.name] = typing.cast(type, hint)
    return found


def listed(settings: type) -> dict[str, type]:
    """Fields of a dataclass that are tuples of one dataclass: arrays of tables without a `kind`."""
    hints = typing.get_type_hints(settings)
    return {
        item.name: typing.cast(type, typing.get_args(hints[item.name])[0])
        for item in dataclasses.fields(settings)
        if typing.get_origin(hints[item.name]) is tuple
        and dataclasses.is_dataclass(typing.get_args(hints[item.name])[0])
    }


def kinds_of(item: dataclasses.Field[Any]) -> Kinds:
    """Members of the union that `item` holds; empty for an ordinary field."""
    kinds: Callable[[], Kinds] | None = item.metadata.get("kinds")
    return kinds() if kinds else {}


def default_of(item: dataclasses.Field[Any]) -> Any:
    """Default of a field, or `dataclasses.MISSING`."""
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def _section(settings: type, kind: str | None = None) -> type[_Section]:
    """A strict pydantic model with the fields of a dataclass, and a literal `kind`."""
    hints = typing.get_type_hints(settings)
    fields: dict[str, Any] = {} if kind is None else {"kind": (Literal[kind], ...)}
    for item in dataclasses.fields(settings):
        if not item.init:
            continue
        kinds = kinds_of(item)
        annotation = _with_sections(hints[item.name]) if not kinds else _union(kinds, hints[item.name])
        required = default_of(item) is dataclasses.MISSING
        # Unset keys stay out (`model_fields_set`), so that the dataclass, not pydantic, supplies its defaults.
        fields[item.name] = (annotation, ...) if required else (annotation | None, None)
    return create_model(settings.__name__, __base__=_Section, **fields)


def _with_sections(hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _section(typing.cast(type, hint))
    if typing.get_origin(hint) in (Union, types.UnionType):
        members = [_with_sections(member) for member in typing.get_args(hint)]
        return Union[tuple(members)]  # noqa: UP007  (built at run time)
    if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        return tuple[_section(typing.get_args(hint)[0]), ...]  # type: ignore[misc]
    return hint


def _union(kinds: Kinds, hint: Any) -> Any:
    members = tuple(_section(settings, kind) for kind, settings in kinds.items())
    one = Annotated[Union[members], Field(discriminator="kind")] if len(members) > 1 else members[0]  # noqa: UP007
    return tuple[one, ...] if typing.get_origin(hint) is tuple else one  # type: ignore[valid-type]


def _build(settings: type, checked: BaseModel, source: str, path: tuple[str, ...]) -> Any:
    """The dataclass itself, inner ones first; its own refusals get the table's path."""
    inner, arrays = nested(settings), listed(settings)
    given: dict[str, Any] = {}
    for item in dataclasses.fields(settings):
        if item.name not in checked.model_fields_set or getattr(checked, item.name) is None:
            continue
        value, kinds = getattr(checked, item.name), kinds_of(item)
        if kinds and isinstance(value, tuple):
            value = tuple(
                _build(kinds[step.kind], step, source, (*path, f"{item.name}[{index}]"))
                for index, step in enumerate(value)
            )
        elif item.name in arrays:
            value = tuple(
                _build(arrays[item.name], row, source, (*path, f"{item.name}[{index}]"))
                for index, row in enumerate(value)
            )
        elif kinds:
            value = _build(kinds[value.kind], value, source, (*path, item.name))
        elif isinstance(value, BaseModel):
            default = default_of(item)
            built = _build(inner[item.name], value, source, (*path, item.name))
            # A table that sets one key keeps what the outer dataclass chose for the others.
            keep = dataclasses.is_dataclass(default) and not isinstance(default, type)
            value = (
                dataclasses.replace(default, **{key: getattr(built, key) for key in value.model_fields_set})
                if keep
                else built
            )
        given[item.name] = value
    try:
        return settings(**given)
    except (CveffError, ValueError) as error:
        raise RecipeError(f"{source}: {_with_path(path, str(error))}") from error


def _with_path(path: tuple[str, ...], message: str) -> str:
    """Put the table's path before a message that names a key of that table, or the table itself."""
    key = re.match(r"[\w.\[\]]+", message)
    if key is None or not path:
        return f"{'.'.join(path)}: {message}" if path else message
    if key[0].startswith(f"{path[-1]}."):
        path = path[:-1]
    elif message[key.end() : key.end() + 1] != ":":
        return f"{'.'.join(path)}: {message}"
    return ".".join((*path, message))


def _first_line(settings: type, values: Any, error: ValidationError) -> str:
    """All that pydantic says about the first wrong key, in one line."""
    details = error.errors(include_url=False)
    # An unknown key is the likelier mistake behind a missing one.
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    path = _path(values, details[0])
    same = [detail for detail in details if _path(values, detail) == path]
    others = len({_path(values, detail) for detail in details}) - 1
    more = f" (and {others} more)" if others else ""
    return f"{_dotted(path)}: {_explain(settings, path, same)}{more}"


def _path(values: Any, detail: ErrorDetails) -> tuple[str | int, ...]:
    """The error's location without the names pydantic adds for members of a union."""
    path: list[str | int] = []
    here = values
    for part in detail["loc"]:
        if isinstance(here, Mapping) and part in here:
            here = here[typing.cast(str, part)]
        elif (
            isinstance(here, Sequence)
            and not isinstance(here, str)
            and isinstance(part, int)
            and part < len(here)
        ):
            here = here[part]
        elif not (detail["type"] == "missing" and part == detail["loc"][-1]):
            continue
        path.append(part)
    if detail["type"] == "union_tag_invalid":
        path.append("kind")
    return tuple(path)


def _dotted(path: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the file"


def _explain(settings: type, path: tuple[str | int, ...], details: list[ErrorDetails]) -> str:
    first = details[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{_suggest(str(path[-1]), _keys(settings, path[:-1], details))}"
    if kind == "missing":
        return "is missing"
    if kind == "union_tag_not_found":
        return f"kind is missing; known: {', '.join(_all_kinds(settings))}"
    if kind in ("union_tag_invalid", "literal_error"):
        known = re.findall(r"[^',\s]+", str(context.get("expected_tags", context.get("expected"))))
        value = context.get("tag", value)
        return f"{_show(value)} is unknown{_suggest(str(value), [word for word in known if word != 'or'])}"
    expected = list(dict.fromkeys(_expected(detail) for detail in details))
    wanted = " or ".join(text for text in expected if text)
    return f"{_show(value)} is not {wanted}"


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] in ("too_long", "too_short"):
        context = detail.get("ctx", {})
        return f"an array of {context.get('max_length', context.get('min_length'))} values"
    if detail["type"] == "missing":
        return "an array of the right length"
    return _EXPECTED.get(detail["type"], f"valid ({detail['msg'][:1].lower()}{detail['msg'][1:]})")


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}…"


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _keys(settings: type, path: tuple[str | int, ...], details: list[ErrorDetails]) -> list[str]:
    """Keys of the table at `path`."""
    here = settings
    for position, part in enumerate(path):
        if isinstance(part, int):
            continue
        item = next(item for item in dataclasses.fields(here) if item.name == part)
        kinds = kinds_of(item)
        if kinds:
            # pydantic puts the member's name right after the array's index.
            chosen = [str(name) for name in details[0]["loc"] if name in kinds] or list(kinds)
            here = kinds[chosen[0]]
            return ["kind", *(field.name for field in dataclasses.fields(here))]
        tables = nested(here) | listed(here)
        if part not in tables:
            return []
        here = tables[str(path[position])]
    return [item.name for item in dataclasses.fields(here) if item.init]


def _all_kinds(settings: type) -> list[str]:
    return [kind for item in dataclasses.fields(settings) for kind in kinds_of(item)]
