"""Stands in for `cuda.bindings.runtime`: calls are checked against the real signatures and done in the host's memory.

Work that is queued on a stream while it is captured is kept, and done when its graph is launched, as on a GPU.
"""

from __future__ import annotations

import ctypes
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any


class CudaRecorder:
    """The module. `fails` maps a call's name to the error it returns; `used` holds (file, name) of every access."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._ok = real.cudaError_t.cudaSuccess
        self.fails: dict[str, str] = {}
        self.used: set[tuple[str, str]] = set()
        self.names: list[str] = []
        self.memory: dict[int, Any] = {}
        self._thread = threading.local()
        self.gpu = ("NVIDIA H200", 9, 0)
        self.handles: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        frame = sys._getframe(1)
        self.used.add((frame.f_code.co_filename, name))
        if not hasattr(self._real, name):
            raise AssertionError(f"cuda.bindings.runtime has no {name}")
        real = getattr(self._real, name)
        if isinstance(real, (type, int)):  # an enumeration, or one of the older constants
            return real

        def call(*given: Any) -> tuple[Any, ...]:
            inspect.signature(real).bind(*given)  # raises TypeError for another number of arguments
            self.names.append(name)
            if name in self.fails:
                return (getattr(self._real.cudaError_t, self.fails[name]), *([None] * 2))
            result = getattr(self, f"_{name}")(*given)
            return (self._ok, *result) if isinstance(result, tuple) else (self._ok, result)

        return call

    def queue(self, work: Callable[[], None]) -> None:
        """Do `work`, or keep it while a graph is recorded."""
        recorded = self._recorded()
        if recorded is None:
            work()
        else:
            recorded.append(work)

    def _recorded(self) -> list[Callable[[], None]] | None:
        """What this thread has queued since it began to record, as `cudaStreamCaptureModeThreadLocal` says."""
        found: list[Callable[[], None]] | None = getattr(self._thread, "recorded", None)
        return found

    def _cudaGetDeviceCount(self) -> int:  # noqa: N802
        return 1

    def _cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802
        name, major, minor = self.gpu

        class Properties:
            pass

        found: Any = Properties()
        real = self._real.cudaDeviceProp()
        assert {"name", "major", "minor"} <= set(dir(real))
        found.name, found.major, found.minor = name.encode() + b"\0rest", major, minor
        return found

    def _cudaGetErrorString(self, error: Any) -> bytes:  # noqa: N802
        return bytes(self._real.cudaGetErrorString(error)[1])

    def _cudaMemGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return 2**20, 2**30

    def _cudaMalloc(self, size: int) -> int:  # noqa: N802
        memory = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    _cudaMallocHost = _cudaMalloc  # noqa: N815

    def _cudaFree(self, pointer: int) -> tuple[()]:  # noqa: N802
        del self.memory[pointer]
        return ()

    _cudaFreeHost = _cudaFree  # noqa: N815

    def _cudaStreamCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        self.handles.add(len(self.names))
        return _Handle(len(self.names))

    def _cudaStreamDestroy(self, stream: Any) -> tuple[()]:  # noqa: N802
        self.handles.remove(int(stream))
        return ()

    def _cudaStreamSynchronize(self, stream: Any) -> tuple[()]:  # noqa: N802
        assert self._recorded() is None, "waiting on a stream that is captured"
        return ()

    def _cudaMemcpyAsync(self, to: int, source: int, count: int, kind: Any, stream: Any) -> tuple[()]:  # noqa: N802
        assert isinstance(kind, self._real.cudaMemcpyKind)
        self.queue(lambda: ctypes.memmove(to, source, count) and None)
        return ()

    def _cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[()]:  # noqa: N802
        assert isinstance(mode, self._real.cudaStreamCaptureMode)
        self._thread.recorded = []
        return ()

    def _cudaStreamEndCapture(self, stream: Any) -> Any:  # noqa: N802
        recorded, self._thread.recorded = self._recorded(), None
        return recorded

    def _cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:  # noqa: N802
        return list(graph)

    def _cudaGraphDestroy(self, graph: Any) -> tuple[()]:  # noqa: N802
        return ()

    def _cudaGraphLaunch(self, graph: Any, stream: Any) -> tuple[()]:  # noqa: N802
        for work in graph:
            work()
        return ()

    def _cudaGraphExecDestroy(self, graph: Any) -> tuple[()]:  # noqa: N802
        return ()


class _Handle:
    def __init__(self, value: int) -> None:
        self._value = value

    def __int__(self) -> int:
        return self._value
