"""Stands in for the package `tensorrt`: every access and call is checked against a release's real API, and recorded."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from typing import Any

SUBCLASSED = ("ILogger", "IProgressMonitor")
"""Classes whose methods TensorRT calls."""


class ContractError(AssertionError):
    """Our code uses something that the real API does not have."""


class Member:
    """A member of an enumeration."""

    def __init__(self, world: World, kind: str, name: str, value: int) -> None:
        self._world, self._kind, self._name, self._value = world, kind, name, value

    def __int__(self) -> int:
        return self._value

    def __str__(self) -> str:
        return f"{self._kind}.{self._name}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Member) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __getattr__(self, name: str) -> Any:
        raise ContractError(f"{self}.{name}: read an enumeration's member by int() or str()")


class World:
    """A release's API, what the objects answer, and what was asked of them.

    Attributes:
        api: as `dump_api` prints it.
        answers: "Class.member" -> a value, or a function of the object and the arguments. What is not there answers by
            its type: a new object of it, True, 0, "".
        used: (file, member) for every access from our files.
    """

    def __init__(self, api: Mapping[str, Any], answers: Mapping[str, Any] | None = None) -> None:
        self.api, self.version = api, api["version"]
        self.answers: dict[str, Any] = dict(answers or {})
        self.used: set[tuple[str, str]] = set()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.module = Module(self)
        self._classes: dict[str, type] = {}

    def note(self, member: str) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__ and frame.f_back is not None:
            frame = frame.f_back
        self.used.add((frame.f_code.co_filename, member))

    def class_of(self, name: str) -> type:
        if name not in self._classes:
            self._classes[name] = Meta(name, (Recorded,), {"_class": name, "_world": self})
        return self._classes[name]

    def checked(self, owner: str, name: str, overloads: list[Any], given: tuple[Any, ...], named: Any) -> Any:
        """The overload that takes these arguments."""
        reasons = [self._refusal(overload, given, named) for overload in overloads]
        for overload, reason in zip(overloads, reasons, strict=True):
            if not reason:
                return overload
        raise ContractError(f"TensorRT {self.version}: {owner}.{name}: {'; '.join(reasons)}")

    def answer(self, owner: str, name: str, kind: str, *arguments: Any) -> Any:
        key = f"{owner}.{name}"
        if key in self.answers:
            answer = self.answers[key]
            return answer(*arguments) if callable(answer) else answer
        if kind in self.api["classes"]:
            return self.class_of(kind)._new()
        return {"bool": True, "int": 0, "str": ""}.get(kind)

    def check_type(self, kind: str, value: Any, where: str) -> str:
        """Why `value` is not what the API takes, or ""."""
        if kind in self.api["classes"]:
            if kind == "Dims":
                is_right = isinstance(value, tuple) and all(isinstance(size, int) for size in value)
            elif isinstance(value, Member):
                is_right = value._kind == kind
            else:
                is_right = kind in [base.__name__ for base in type(value).__mro__]
        else:
            plain: Mapping[str, Any] = {
                "str": str, "bool": bool, "int": int, "SupportsInt": int, "tuple": tuple, "list": list,
                "Buffer": bytes, "buffer": bytes,
            }  # fmt: skip
            is_right = isinstance(value, plain.get(kind, object))
        return "" if is_right else f"{where} is {value!r}, not {kind}"

    def _refusal(self, overload: Mapping[str, Any], given: tuple[Any, ...], named: Mapping[str, Any]) -> str:
        parameters = [item for item in overload["parameters"] if item["name"] != "self"]
        names = [item["name"] for item in parameters]
        if len(given) > len(parameters):
            return f"takes {len(parameters)} arguments, {len(given)} were given"
        unknown = [name for name in named if name not in names[len(given) :]]
        if unknown:
            return f"has no argument {unknown[0]!r}: it takes {names}"
        values = {**dict(zip(names, given, strict=False)), **named}
        for item in parameters:
            if item["name"] in values:
                reason = self.check_type(item["type"], values[item["name"]], item["name"])
                if reason:
                    return reason
            elif not item["optional"]:
                return f"argument {item['name']!r} is missing"
        return ""


class Module:
    """`import tensorrt as trt`."""

    __spec__ = ModuleSpec("tensorrt", None)  # torch asks for it

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        world = self._world
        if name == "__version__":
            return world.version
        if name.startswith("__"):
            raise AttributeError(name)
        world.note(name)
        if name in world.api["functions"]:
            return _function(world, "tensorrt", name, world.api["functions"][name])
        if name not in world.api["classes"]:
            raise ContractError(f"TensorRT {world.version} has no tensorrt.{name}")
        return world.class_of(name)


class Meta(type):
    """Finds members of enumerations, and lets nothing be called that the real class does not have."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        world = cls._world  # type: ignore[attr-defined]
        described = world.api["classes"][cls._class]  # type: ignore[attr-defined]
        world.note(name)
        if name not in described["constants"]:
            raise ContractError(f"TensorRT {world.version} has no {cls.__name__}.{name}")
        found = described["constants"][name]
        return Member(world, found["type"], name, found["value"])


class Recorded(metaclass=Meta):
    """An object of TensorRT's."""

    _class: str
    _world: World

    def __init_subclass__(cls, **_: Any) -> None:
        """What our subclasses override must have the names of arguments that TensorRT calls it with."""
        owner = getattr(cls, "_class", "")
        if cls.__name__ == owner or owner not in SUBCLASSED:
            return
        for name, overloads in cls._world.api["classes"][owner]["methods"].items():
            if name == "__init__":
                continue
            ours = cls.__dict__.get(name)
            wanted = [item["name"] for item in overloads[0]["parameters"]]
            if ours is None or list(inspect.signature(ours).parameters) != wanted:
                raise ContractError(f"TensorRT {cls._world.version} calls {owner}.{name}{tuple(wanted)}")

    def __init__(self, *given: Any, **named: Any) -> None:
        described = self._world.api["classes"][self._class]
        constructors = described["methods"].get("__init__")
        if constructors is None:
            raise ContractError(f"TensorRT {self._world.version}: {self._class} cannot be constructed")
        self._world.checked(self._class, "__init__", constructors, given, named)
        self._world.calls.append((self._class, given, named))

    @classmethod
    def _new(cls) -> Recorded:
        return cls.__new__(cls)

    def __bytes__(self) -> bytes:
        return bytes(self._world.answers[f"{self._class}.bytes"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        world, owner = self._world, self._class
        described = world.api["classes"][owner]
        world.note(name)
        if name in described["properties"]:
            return world.answer(owner, name, described["properties"][name]["type"], self)
        if name not in described["methods"]:
            raise ContractError(f"TensorRT {world.version} has no {owner}.{name}")
        return _function(world, owner, name, described["methods"][name], self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        world, owner = self._world, self._class
        world.note(name)
        described = world.api["classes"][owner]["properties"].get(name)
        if described is None or not described["settable"]:
            raise ContractError(f"TensorRT {world.version}: {owner}.{name} cannot be set")
        reason = world.check_type(described["type"], value, name)
        if reason:
            raise ContractError(f"TensorRT {world.version}: {owner}.{reason}")
        world.calls.append((f"{owner}.{name} =", (value,), {}))


def _function(world: World, owner: str, name: str, overloads: list[Any], *own: Any) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        overload = world.checked(owner, name, overloads, given, named)
        world.calls.append((f"{owner}.{name}", given, named))
        return world.answer(owner, name, overload["returns"], *own, *given, *named.values())

    return call
