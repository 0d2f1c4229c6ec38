"""Prints the API of the importable `tensorrt_bindings` as JSON; run in a process that finds the stub libraries.

pybind11 writes each method's signatures into its docstring: `name(self: Class, argument: type = default) -> type`.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import tensorrt_bindings as trt  # type: ignore[import-not-found,unused-ignore]


def main() -> None:
    classes, functions = {}, {}
    for name in dir(trt):
        value = getattr(trt, name)
        if isinstance(value, type):
            classes[name] = describe(value)
        elif signatures(value, name):
            functions[name] = signatures(value, name)
    json.dump({"version": trt.__version__, "classes": classes, "functions": functions}, sys.stdout)


def describe(cls: type) -> dict[str, Any]:
    methods, properties, constants = {}, {}, {}
    for name in dir(cls):
        value = getattr(cls, name)
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(value, property):
            returned = (value.fget.__doc__ or "").rpartition("-> ")[2].strip() if value.fget else ""
            properties[name] = {"type": short(returned), "settable": value.fset is not None}
        elif isinstance(getattr(type(value), "__members__", None), dict):
            constants[name] = {"type": type(value).__name__, "value": int(value)}
        elif signatures(value, name):
            methods[name] = signatures(value, name)
    bases = [base.__name__ for base in cls.__mro__[1:] if base.__module__.startswith("tensorrt")]
    return {"methods": methods, "properties": properties, "constants": constants, "bases": bases}


def signatures(value: Any, name: str) -> list[dict[str, Any]]:
    found = []
    for line in (getattr(value, "__doc__", None) or "").splitlines():
        match = re.fullmatch(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.+)", line.strip())
        if match and "*args" not in match[1]:
            parameters = [parameter(text) for text in split(match[1])]
            found.append({"parameters": parameters, "returns": short(match[2])})
    return found


def parameter(text: str) -> dict[str, Any]:
    """`name: type = default`; the default of an enum, as `<Name.MEMBER: 2>`, holds a colon too."""
    declared, _, default = text.partition(" = ")
    name, _, kind = declared.partition(": ")
    return {"name": name, "type": short(kind), "optional": bool(default)}


def split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(<{") - (letter in "])>}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def short(kind: str) -> str:
    """`tensorrt_bindings.tensorrt.Builder` -> `Builder`."""
    return kind.strip().replace("nvonnxparser::I", "").split("::")[-1].split(".")[-1]


if __name__ == "__main__":
    main()
