"""Kernels are built once, whole or not at all, and where they cannot be built PyTorch does the work."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cveff.errors import KernelError
from cveff.kernels import build
from cveff.kernels.gather_mlp import SOURCE

ROOT = Path(__file__).parents[2]
WITHOUT = """
import torch
from cveff.kernels.gather_mlp import choice, gather_mlp
from cveff.kernels.decode_attention import choice as attention_choice
x, w = torch.ones(1, 4), torch.ones(3, 4)
for _ in range(2):
    print(choice(x, w, w), gather_mlp(x, torch.tensor([0, 2]), w, w, activation="relu").tolist())
print(attention_choice(x[None], x, x))
"""


def test_without_a_compiler_pytorch_does_the_work_after_one_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "CXX": ""}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("there is no C++ compiler; install g++") == 1 == len(done.stderr.splitlines())
    assert done.stdout.count("implementation='reference'") == 3 and "[[8.0, 8.0, 8.0, 8.0]]" in done.stdout


def test_threads_that_build_at_once_leave_one_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(build.built, [SOURCE] * 3))
    (path,) = paths
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    before = path.stat().st_mtime_ns
    assert build.built(SOURCE) == path and path.stat().st_mtime_ns == before


def test_the_key_depends_on_source_flags_and_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "op" / "cpu.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" void nothing() {}')
    paths = [build.built(source)]
    source.write_text('extern "C" void nothing() { }')
    paths.append(build.built(source))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    paths.append(build.built(source))
    monkeypatch.setattr(build, "code_flags", lambda: ["another"])
    paths.append(build.built(source))
    assert len(set(paths)) == 4


def test_what_does_not_compile_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Not caplog: libraries that other tests load turn levels and handlers of a whole process.
    said: list[str] = []
    monkeypatch.setattr(build._log, "warning", lambda text, *values: said.append(text % values))
    source = tmp_path / "broken" / "cpu.cpp"
    source.parent.mkdir()
    source.write_text("this is not C++")
    with pytest.raises(KernelError, match=r"failed: .*error"):
        build.built(source)
    assert list((tmp_path / "cveff" / "kernels").iterdir()) == []
    assert build.library(source) is None and build.library(source) is None
    assert len(said) == 1 and "broken runs as plain PyTorch" in said[0]
