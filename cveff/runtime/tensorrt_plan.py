"""What a TensorRT plan was built from and for: a JSON file beside it, compared before the plan is loaded."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .cuda import Gpu
from .errors import EngineError
from .files import atomic_path
from .manifest import sha256
from .tensorrt_settings import TensorRT, settings_from

FORMAT = 1
_AMPERE = (8, 0)
_KEYS = {
    "format": int,
    "onnx_sha256": str,
    "plan_sha256": str,
    "gpu": str,
    "compute_capability": list,
    "tensorrt": str,
    "platform": str,
    "settings": dict,
    "build_seconds": float,
}


@dataclass(frozen=True)
class Machine:
    """Where plans are built and run.

    Attributes:
        gpu: the GPU.
        tensorrt: its release, such as "11.4.0.106".
        platform: system and processor, such as "linux-x86_64".
    """

    gpu: Gpu
    tensorrt: str
    platform: str = f"{sys.platform}-{platform.machine()}"

    def __str__(self) -> str:
        return f"{self.gpu} with TensorRT {self.tensorrt}"


@dataclass(frozen=True)
class PlanInfo:
    """What a plan is.

    Attributes:
        onnx_sha256: of the file it was built from, external weights included (`onnx_hash`).
        machine: what built it.
        settings: how it was built.
        build_seconds: how long that took.
        plan_sha256: of the plan itself.
    """

    onnx_sha256: str
    machine: Machine
    settings: TensorRT
    build_seconds: float
    plan_sha256: str

    def mismatch(self, machine: Machine, onnx_sha256: str | None, settings: TensorRT) -> str:
        """Why the plan must not be loaded, or "".

        Args:
            machine: this one.
            onnx_sha256: of the ONNX file it stands for; None where there is none to compare.
            settings: how it should have been built.
        """
        own = self.machine
        if onnx_sha256 not in (None, self.onnx_sha256):
            return "it was built from another ONNX file"
        if replace(settings, version=self.settings.version) != self.settings:  # the release is compared below
            return "it was built with other settings"
        if machine.platform != own.platform:
            return f"it was built on {own.platform}, this is {machine.platform}"
        if not self._runs_on(machine.gpu):
            return f"it was built for {own.gpu}, this is {machine.gpu}"
        if not self._runs_with(machine.tensorrt):
            return f"it was built with TensorRT {own.tensorrt}, this is {machine.tensorrt}"
        return ""

    def to_json(self) -> dict[str, Any]:
        """As `PATH.json` holds it."""
        return {
            "format": FORMAT,
            "onnx_sha256": self.onnx_sha256,
            "plan_sha256": self.plan_sha256,
            "gpu": self.machine.gpu.name,
            "compute_capability": list(self.machine.gpu.compute_capability),
            "tensorrt": self.machine.tensorrt,
            "platform": self.machine.platform,
            "settings": asdict(self.settings),
            "build_seconds": self.build_seconds,
        }

    def _runs_on(self, gpu: Gpu) -> bool:
        if self.settings.hardware_compatible:
            return gpu.compute_capability >= _AMPERE
        return gpu == self.machine.gpu

    def _runs_with(self, release: str) -> bool:
        """The same release; for a version-compatible plan a later one, of the same major release or the next (the
        support matrix of release 11: 10 on 11)."""
        if not self.settings.version_compatible:
            return release == self.machine.tensorrt
        return _numbers(release) >= _numbers(self.machine.tensorrt)


def info_path(plan: Path) -> Path:
    """Where a plan's `PlanInfo` lies: `model.plan.json` beside `model.plan`."""
    return plan.with_name(f"{plan.name}.json")


def write_plan(plan: Path, content: bytes, info: PlanInfo) -> None:
    """Write a plan and its `PlanInfo`, each atomically; whoever reads one of each is told by the hash.

    Raises:
        CveffError: the folder cannot be written or the disk is full.
    """
    with atomic_path(plan) as temporary:
        temporary.write_bytes(content)
    with atomic_path(info_path(plan)) as temporary:
        temporary.write_text(json.dumps(info.to_json(), indent=2) + "\n", encoding="utf-8")


def read_info(plan: Path) -> PlanInfo:
    """What a plan says it is.

    Raises:
        EngineError: no such file, or it is damaged or of another cveff.
    """
    path = info_path(plan)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        for key, kind in _KEYS.items():
            if not isinstance(values.get(key), kind):
                raise ValueError(f"{key} is {values.get(key)!r}")
        release = int(values["tensorrt"].split(".")[0])
        first, second = values["compute_capability"]
        machine = Machine(Gpu(values["gpu"], (first, second)), values["tensorrt"], values["platform"])
        settings = settings_from(values["settings"], release)
    except FileNotFoundError:
        raise EngineError(
            f"{plan} has no {path.name} beside it, which says what it was built from and for; open the ONNX file, "
            "which builds a plan of its own"
        ) from None
    except (OSError, ValueError, EngineError) as error:
        raise EngineError(
            f"{path} is damaged or was not written by cveff ({error}); build the plan again"
        ) from error
    return PlanInfo(values["onnx_sha256"], machine, settings, values["build_seconds"], values["plan_sha256"])


def read_plan(plan: Path, info: PlanInfo) -> bytes:
    """The plan's bytes.

    Raises:
        EngineError: they are not those that `info` was written for.
    """
    try:
        content = plan.read_bytes()
    except OSError as error:
        raise EngineError(f"{plan} cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != info.plan_sha256:
        raise EngineError(f"{plan} is not the plan that {info_path(plan).name} describes; build it again")
    return content


def onnx_hash(onnx: Path) -> str:
    """SHA-256 of an ONNX file and of the weights beside it: `NAME.onnx*` and `NAME.data`.

    Raises:
        BundleError: a file cannot be read.
    """
    beside = [path for path in onnx.parent.glob(f"{_escaped(onnx.name)}?*") if path.is_file()]
    beside += [path for path in (onnx.with_suffix(".data"),) if path.is_file()]
    if not beside:
        return sha256(onnx)
    whole = hashlib.sha256()
    for path in (onnx, *sorted(beside)):
        whole.update(bytes.fromhex(sha256(path)))
    return whole.hexdigest()


def _escaped(name: str) -> str:
    """`name` for `glob`, whose brackets mean something."""
    return name.replace("[", "[[]")


def _numbers(release: str) -> tuple[int, ...]:
    """Major, minor and patch release."""
    return tuple(int(part) for part in release.split(".")[:3] if part.isdigit())
