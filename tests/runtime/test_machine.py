"""What a bundle records of the machine, and what is compared on the device."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cveff.runtime import machine


def test_describe_is_json_with_every_key() -> None:
    values = machine.describe()
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {"cpu", "architecture", "cores", "isa", "memory_bytes", "os", "python"}
    assert values["cores"] >= 1
    assert values["cpu"]
    assert set(values["isa"]) <= set(machine.ISA_FLAGS)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_flags_are_whole_words_of_the_processors_list() -> None:
    words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").replace("\n", " ").split())
    assert set(machine.isa()) <= words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: X\nflags\t\t: sse avx2 avx512_vnni\n\nprocessor: 1\n", ["avx2", "avx512_vnni"]),
        ("Features\t: fp asimd asimddp i8mm\n", ["asimd", "asimddp", "i8mm"]),
        ("flags : avx512_vnnix\n", []),
        ("", []),
    ],
)
def test_x86_and_arm_lists(monkeypatch: pytest.MonkeyPatch, text: str, expected: list[str]) -> None:
    monkeypatch.setattr(machine.Path, "read_text", lambda *_, **__: text)
    assert machine.isa() == expected


def test_missing_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "isa", lambda: ["avx2"])
    assert machine.missing_isa(["avx2", "avx512_vnni", "amx_int8"]) == ["avx512_vnni", "amx_int8"]
    assert machine.missing_isa([]) == []
    monkeypatch.setattr(machine, "isa", list)  # a system that does not tell
    assert machine.missing_isa(["avx2"]) == []


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1)]
)
def test_a_container_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch, text: str, cores: int) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.Path, "is_file", lambda _: True)
    monkeypatch.setattr(machine.Path, "read_text", lambda *_, **__: text)
    assert machine.usable_cores() == cores


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        (["avx2", "fma"], True),
        (["avx2", "avx512f", "avx512bw"], True),
        (["avx2", "avx_vnni"], False),
        (["avx2", "avx512f", "avx512_vnni"], False),
        (["asimd", "asimddp"], False),
        ([], False),
    ],
)
def test_x86_without_vnni_clips(instructions: list[str], expected: bool) -> None:
    assert machine.saturates(instructions) is expected
