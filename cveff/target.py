"""`Target`: the device a model is built for, as data: engines to try, precisions, threads, batch sizes."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cveff.errors import TargetError
from cveff.runtime.machine import ISA_FLAGS, isa, usable_cores

_ENGINES = (
    "onnxruntime",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-coreml",
    "onnxruntime-qnn",
    "openvino",
    "aot-inductor",
)
_PRECISIONS = ("fp32", "bf16", "int8", "int8-mixed", "int8-asymmetric", "int8-bf16")
_PROFILES = Path(__file__).parent / "export" / "targets"


@dataclass(frozen=True)
class Target:
    """A device profile.

    Attributes:
        name, description: for people.
        candidates: (engine, precision) pairs that `deploy` builds, measures and chooses from. Engines:
            "onnxruntime" and its execution providers ("onnxruntime-cuda", …), "openvino", "aot-inductor"; precisions:
            "fp32", "bf16", "int8"; for ONNX Runtime also "int8-mixed" (layers that are faster in floats, or lose too
            much, stay there); for OpenVINO also "int8-asymmetric" (zero points for activations) and "int8-bf16"
            (bfloat16 for what is not quantized).
        threads: threads of the engine; 0 means every core this process may use.
        batch_sizes: batch sizes that are measured; the first decides which candidate is fastest.
        memory_mb: limit on the peak resident memory of a fresh process that runs the file, in MiB; 0: none.
        instructions: those of `ISA_FLAGS` that the device has; None: those of this machine.
    """

    name: str
    description: str
    candidates: tuple[tuple[str, str], ...]
    threads: int = 0
    batch_sizes: tuple[int, ...] = (1, 8)
    memory_mb: int = 0
    instructions: tuple[str, ...] | None = None

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        """Instruction sets the device is assumed to have; none where they are this machine's and it does not tell."""
        return tuple(isa()) if self.instructions is None else self.instructions

    @property
    def num_threads(self) -> int:
        """Threads to use on this machine."""
        return self.threads or usable_cores()


def load_target(target: str | Path | Target) -> Target:
    """A profile by name (`export/targets/NAME.toml`) or from a user's own TOML file.

    Raises:
        TargetError: no such profile, or a key is unknown or has a wrong type.
    """
    if isinstance(target, Target):
        return target
    path = Path(target) if str(target).endswith(".toml") else _PROFILES / f"{target}.toml"
    if not path.is_file():
        raise TargetError(
            f"no target profile {str(target)!r}; known: {', '.join(target_names())}, or a .toml file"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"{path}: not valid TOML: {error}") from error
    return _validated(values, path)


def target_names() -> list[str]:
    """Names of the profiles that come with cveff."""
    return sorted(path.stem for path in _PROFILES.glob("*.toml"))


def _validated(values: dict[str, Any], path: Path) -> Target:
    unknown = set(values) - {item.name for item in fields(Target)}
    if unknown:
        raise TargetError(f"{path}: unknown keys {sorted(unknown)}")
    for key in ("name", "description", "candidates"):
        if key not in values:
            raise TargetError(f"{path}: {key} is missing")
    pairs = []
    for pair in values["candidates"]:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or pair[0] not in _ENGINES or pair[1] not in _PRECISIONS:
            raise TargetError(
                f"{path}: candidates holds {pair!r}; give [engine, precision] with engine {', '.join(_ENGINES)} "
                f"and precision {', '.join(_PRECISIONS)}"
            )
        pairs.append((pair[0], pair[1]))
    sizes = tuple(values.get("batch_sizes", (1, 8)))
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise TargetError(f"{path}: batch_sizes is {list(sizes)!r}; give positive integers")
    for key in ("threads", "memory_mb"):
        if not isinstance(values.get(key, 0), int) or values.get(key, 0) < 0:
            raise TargetError(f"{path}: {key} is {values[key]!r}; give an integer of 0 or more")
    return Target(
        name=str(values["name"]),
        description=str(values["description"]),
        candidates=tuple(pairs),
        threads=values.get("threads", 0),
        batch_sizes=sizes,
        memory_mb=values.get("memory_mb", 0),
        instructions=_instructions(values["instructions"], path) if "instructions" in values else None,
    )


def _instructions(names: Any, path: Path) -> tuple[str, ...]:
    """In the order of `ISA_FLAGS`, each once."""
    wrong = names if not isinstance(names, list) else [name for name in names if name not in ISA_FLAGS]
    if not isinstance(names, list) or wrong:
        raise TargetError(
            f"{path}: instructions: {wrong!r} cannot be used; give a list out of {', '.join(ISA_FLAGS)}, or leave "
            "the key out for those of the machine that deploys"
        )
    return tuple(name for name in ISA_FLAGS if name in names)
