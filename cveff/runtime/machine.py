"""What processor, memory and system this is: recorded in a bundle, and compared on the device."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx_vnni_int8",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)
"""Instruction sets that decide how fast, and on some engines how accurately, a quantized network runs."""

_CODE = (
    "avx",
    "amx",
    "fma",
    "f16c",
    "bmi",
    "sse",
    "ssse",
    "gfni",
    "vaes",
    "vpclmul",
    "sha",
    "movbe",
    "adx",
    "abm",
)
"""How those of an x86 processor's flags begin that a compiler may use; on Arm all of them are of that kind."""

_VNNI = frozenset({"avx_vnni", "avx512_vnni"})


def describe() -> dict[str, Any]:
    """This machine: `cpu`, `architecture`, `cores`, `isa`, `memory_bytes`, `os`, `python`.

    `isa` lists those of `ISA_FLAGS` the processor has, and is empty where the system does not tell;
    `cores` is how many this process may use; `memory_bytes` is None where the system does not tell.
    """
    lines = _cpu_lines()
    return {
        "cpu": lines.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "isa": isa(),
        "memory_bytes": _memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def isa() -> list[str]:
    """Those of `ISA_FLAGS` that this processor has; empty where the system does not tell."""
    lines = _cpu_lines()
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    return [flag for flag in ISA_FLAGS if flag in flags]


def missing_isa(measured: Iterable[str]) -> list[str]:
    """Instruction sets among `measured` that this processor lacks; empty where the system does not tell."""
    own = isa()
    return [flag for flag in measured if flag not in own] if own else []


def code_flags() -> list[str]:
    """Flags of this processor that code compiled for it may rely on; empty where the system does not tell."""
    lines = _cpu_lines()
    x86 = [flag for flag in lines.get("flags", "").split() if flag.startswith(_CODE)]
    return sorted(x86 or lines.get("Features", "").split())


def missing_code_flags(compiled: Iterable[str]) -> list[str]:
    """Those of a file's `code_flags` that this processor lacks; empty where the system does not tell."""
    own = code_flags()
    return [flag for flag in compiled if flag not in own] if own else []


def saturates(instructions: Iterable[str]) -> bool:
    """Whether these are of an x86 processor whose integer kernels clip: AVX2 without VNNI.

    They add pairs of uint8 × int8 products in 16 saturating bits. Arm's do not.
    """
    own = set(instructions)
    return "avx2" in own and not own & _VNNI


def usable_cores() -> int:
    """Cores this process may use: its affinity and its control group's quota, whichever is less."""
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _quota()
    return max(1, min(cores, math.ceil(quota))) if quota is not None else cores


def _quota() -> float | None:
    """Cores granted by the container's CPU quota, where there is one: cgroup v2 or, without it, v1."""
    folder = Path("/sys/fs/cgroup")
    if (folder / "cpu.max").is_file():
        files = [folder / "cpu.max"]  # "max 100000" or "150000 100000"
    else:
        files = [folder / "cpu" / "cpu.cfs_quota_us", folder / "cpu" / "cpu.cfs_period_us"]
    try:
        amount, period = " ".join(file.read_text(encoding="ascii") for file in files).split()
    except (OSError, ValueError):
        return None  # no control groups
    return int(amount) / int(period) if amount.isdigit() and int(amount) else None


def _cpu_lines() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
