"""The real API of each release, and objects that check what our code asks of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .cuda_recorder import CudaRecorder
from .kit import RELEASES, Kit, KitError, get_kit
from .recorder import World


@pytest.fixture(scope="session", params=sorted(RELEASES))
def kit(request: pytest.FixtureRequest) -> Kit:
    """The bindings of each release in turn; kept in pytest's cache folder."""
    try:
        return get_kit(request.param, request.config.cache.mkdir("trt_contract"))
    except KitError as error:
        pytest.skip(f"TensorRT's Python bindings cannot be had here: {error}")


@pytest.fixture
def world(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> World:
    """`import tensorrt` gives its module."""
    world = World(kit.api)
    monkeypatch.setitem(sys.modules, "tensorrt", world.module)  # type: ignore[arg-type]
    return world


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaRecorder:
    """What `cuda.bindings.runtime` imports: its calls are checked against the real one, on the host's memory."""
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    recorder = CudaRecorder(real)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", recorder)  # type: ignore[arg-type]
    return recorder


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Plans and timing caches go to the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cveff" / "tensorrt"
