"""`Target`: the device a model is built for, as data: engines to try, precisions, threads, batch sizes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cveff.errors import EngineError, RecipeError, TargetError
from cveff.runtime.engines import available_engines
from cveff.runtime.machine import ISA_FLAGS, isa, missing_isa, usable_cores
from cveff.runtime.tensorrt_settings import TensorRT, check_settings
from cveff.schema import parse

__all__ = [
    "CHANNEL_MULTIPLE",
    "PRECISIONS",
    "Scheme",
    "Target",
    "TensorRT",
    "load_target",
    "obstacles",
    "target_names",
]

PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("fp32", "int8", "int8-mixed"),
    "openvino": ("fp32", "bf16", "int8", "int8-asymmetric", "int8-bf16"),
    "tensorrt": ("fp32", "fp16", "bf16", "int8", "fp8"),
    "aot-inductor": ("fp32", "bf16"),
    "onnxruntime-cuda": ("fp32", "fp16", "int8"),
    "onnxruntime-tensorrt": ("fp32", "fp16", "int8"),
    "onnxruntime-coreml": ("fp32", "int8"),
    "onnxruntime-qnn": ("fp32", "int8"),
}
"""Engines a target may name, and the precisions each has."""

Scheme = Literal["cpu", "cpu-signed", "openvino", "tensorrt"]
"""What an engine asks of int8. "cpu-signed" is "cpu" with symmetric signed activations (Arm); in "openvino" those with
negative values are symmetric and signed, so that no zero point has to be subtracted."""

_SCHEMES: Mapping[str, Scheme] = {
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "onnxruntime-tensorrt": "tensorrt",
}

CHANNEL_MULTIPLE = 8
"""Channels and ranks are multiples of this unless a target says otherwise: engines compute channels in blocks."""

_PROFILES = Path(__file__).parent / "export" / "targets"


def _check(key: str, value: object, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise TargetError(f"{key}: {value!r} cannot be used; give {wanted}")


@dataclass(frozen=True)
class Target:
    """A device profile.

    Attributes:
        name, description: for people.
        candidates: (engine, precision) pairs that `deploy` builds, measures and chooses from, out of `PRECISIONS`.
            "int8-mixed": layers that are faster in floats, or lose too much, stay there; "int8-asymmetric": zero points
            for activations; "int8-bf16": bfloat16 for what is not quantized.
        threads: threads of the engine; 0 means every core this process may use.
        batch_sizes: batch sizes that are measured; the first decides which candidate is fastest.
        memory_mb: limit on the peak resident memory of a fresh process that runs the file, in MiB; 0: none.
        instructions: those of `ISA_FLAGS` that the device has; None: those of this machine.
        scheme: how `quantize` rounds for the device; None: as its first engine for int8 asks.
        channel_multiple: channels and ranks that compression leaves are multiples of this.
        tensorrt: how TensorRT plans are built.

    Raises:
        TargetError: at construction, for a value that cannot be used.
    """

    name: str
    description: str
    candidates: tuple[tuple[str, str], ...]
    threads: int = 0
    batch_sizes: tuple[int, ...] = (1, 8)
    memory_mb: int = 0
    instructions: tuple[str, ...] | None = None
    scheme: Scheme | None = None
    channel_multiple: int = CHANNEL_MULTIPLE
    tensorrt: TensorRT = field(default_factory=TensorRT)

    def __post_init__(self) -> None:
        _check("candidates", list(self.candidates), len(self.candidates) > 0, "[engine, precision] pairs")
        for engine, precision in self.candidates:
            _check("candidates", engine, engine in PRECISIONS, f"an engine out of {', '.join(PRECISIONS)}")
            known = PRECISIONS[engine]
            _check(
                "candidates",
                [engine, precision],
                precision in known,
                f"a precision out of {', '.join(known)} to {engine}",
            )
        sizes = self.batch_sizes
        _check("batch_sizes", list(sizes), bool(sizes) and min(sizes) >= 1, "positive integers")
        _check("threads", self.threads, self.threads >= 0, "an integer of 0 or more")
        _check("memory_mb", self.memory_mb, self.memory_mb >= 0, "an integer of 0 or more")
        _check("channel_multiple", self.channel_multiple, self.channel_multiple >= 1, "1 or more channels")
        if self.instructions is not None:
            wrong = [name for name in self.instructions if name not in ISA_FLAGS]
            _check(
                "instructions",
                wrong,
                not wrong,
                f"names out of {', '.join(ISA_FLAGS)}, or leave the key out for those of the machine that deploys",
            )
            ordered = tuple(name for name in ISA_FLAGS if name in self.instructions)
            object.__setattr__(self, "instructions", ordered)
        try:
            check_settings(self.tensorrt)
        except EngineError as error:
            raise TargetError(str(error)) from error
        if "tensorrt" in self.engines:
            least, _, most = self.tensorrt.batches
            _check(
                "batch_sizes",
                list(sizes),
                least <= min(sizes) and max(sizes) <= most,
                f"sizes from {least} to {most}, which tensorrt.batches allows, or widen that",
            )

    def to_json(self) -> dict[str, Any]:
        """Every key, as plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines of the candidates, each once."""
        return tuple(dict.fromkeys(engine for engine, _ in self.candidates))

    @property
    def int8_scheme(self) -> Scheme:
        """How int8 is rounded for the device: `scheme`, or what the first engine for int8 asks."""
        if self.scheme is not None:
            return self.scheme
        engines = (engine for engine, precision in self.candidates if precision.startswith("int8"))
        return _SCHEMES.get(next(engines, ""), "cpu")

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        """Instruction sets the device is assumed to have; none where they are this machine's and it does not tell."""
        return tuple(isa()) if self.instructions is None else self.instructions

    @property
    def num_threads(self) -> int:
        """Threads to use on this machine."""
        return self.threads or usable_cores()


def obstacles(target: Target) -> tuple[str, ...]:
    """What a target asks for and this machine lacks, engines and instruction sets, a line each; nothing: it has all."""
    here = available_engines()
    engines = [engine for engine in target.engines if engine not in here]
    instructions = missing_isa(target.instructions or ())
    return (
        *([f"does not run {', '.join(engines)}"] if engines else []),
        *([f"has no {', '.join(instructions)}"] if instructions else []),
    )


def load_target(target: str | Path | Target) -> Target:
    """A profile by name (`export/targets/NAME.toml`) or from a user's own TOML file.

    Raises:
        TargetError: no such profile, or a key is unknown, missing or has a value that cannot be used.
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
        return parse(Target, values, str(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: not valid TOML: {error}") from error
    except RecipeError as error:
        raise TargetError(str(error)) from error


def target_names() -> list[str]:
    """Names of the profiles that come with cveff."""
    return sorted(path.stem for path in _PROFILES.glob("*.toml"))
