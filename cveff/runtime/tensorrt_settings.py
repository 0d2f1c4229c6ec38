"""How TensorRT plans are built for a target, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import EngineError

VERSIONS = (10, 11)
"""Major releases that one code path builds for and runs on."""


@dataclass(frozen=True)
class TensorRT:
    """How plans are built for a target: `[tensorrt]` of a profile.

    Attributes:
        version: major release, 10 or 11.
        batches: least, most usual and most images a call: the optimization profile.
        workspace_mb: MiB the builder may use for a layer's intermediate values; 0: its default, all there is.
        optimization_level: 0 (built soonest) to 5 (searched longest).
        version_compatible: later releases of TensorRT load the plan too.
        hardware_compatible: GPUs of every architecture from Ampere on load the plan too.
        refittable: weights can be exchanged for others without building again.
        strip_weights: the plan holds no weights; they are read from the ONNX file when it is loaded.
        sparse_weights: 2:4 sparse kernels are tried where weights are so.
        dla: core of the deep learning accelerator, with the GPU for what that cannot run; None: the GPU alone.
    """

    version: int = 11
    batches: tuple[int, int, int] = (1, 8, 32)
    workspace_mb: int = 0
    optimization_level: int = 3
    version_compatible: bool = False
    hardware_compatible: bool = False
    refittable: bool = False
    strip_weights: bool = False
    sparse_weights: bool = False
    dla: int | None = None


_FLAGS = tuple(item.name for item in fields(TensorRT) if item.type == "bool")


def settings_from(options: Mapping[str, Any], installed: int) -> TensorRT:
    """Settings from JSON values.

    Args:
        options: those that differ from the defaults, by `TensorRT`'s names.
        installed: major release of TensorRT, for options that name none.

    Raises:
        EngineError: an unknown option, or a value that cannot be.
    """
    known = {item.name for item in fields(TensorRT)}
    for key in options:
        if key not in known:
            raise EngineError(f"tensorrt has no option {key!r}; known: {', '.join(sorted(known))}")
    values = {"version": installed, **options}
    if isinstance(values.get("batches"), list):
        values["batches"] = tuple(values["batches"])
    return check_settings(TensorRT(**values))


def check_settings(settings: TensorRT) -> TensorRT:
    """`settings`, after a look at every value.

    Raises:
        EngineError: names the setting, its value and what to give.
    """
    batches = settings.batches
    if settings.version not in VERSIONS:
        raise _wrong("version", settings.version, f"one of {', '.join(map(str, VERSIONS))}")
    is_triple = isinstance(batches, tuple) and len(batches) == 3 and all(map(_is_integer, batches))
    if not is_triple or not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise _wrong("batches", batches, "three integers of 1 or more in ascending order, such as (1, 8, 32)")
    if not _is_integer(settings.workspace_mb) or settings.workspace_mb < 0:
        raise _wrong("workspace_mb", settings.workspace_mb, "MiB, or 0 for TensorRT's own limit")
    if settings.optimization_level not in range(6):
        raise _wrong("optimization_level", settings.optimization_level, "an integer from 0 to 5")
    for name in _FLAGS:
        if not isinstance(getattr(settings, name), bool):
            raise _wrong(name, getattr(settings, name), "true or false")
    if settings.dla is not None and (not _is_integer(settings.dla) or settings.dla < 0):
        raise _wrong("dla", settings.dla, "a core's number from 0 on, or leave it out for the GPU")
    if settings.dla is not None and batches[0] != batches[2]:
        raise _wrong(
            "batches", batches, f"one size, such as {(batches[1],) * 3}: the DLA takes no dynamic shapes"
        )
    return settings


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(name: str, value: Any, advice: str) -> EngineError:
    return EngineError(f"option {name} of tensorrt is {value!r}; give {advice}")
