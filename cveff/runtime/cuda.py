"""The few calls of the CUDA runtime that TensorRT's session needs, through `cuda-python`, with errors of ours.

Device memory, pinned host memory, streams and graphs: the "CUDA Runtime API" pages of its documentation.
"""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import EngineError

_NO_GPU = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice")
_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"

OUT_OF_MEMORY_ADVICE = "close other programs on the GPU, or give smaller batches or less workspace_mb"


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as its driver says, such as "NVIDIA H200".
        compute_capability: its architecture's version, such as (9, 0).
    """

    name: str
    compute_capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {'.'.join(map(str, self.compute_capability))})"


class Cuda:
    """The first GPU that this process sees (`CUDA_VISIBLE_DEVICES` chooses). Pointers are integers.

    Raises:
        EngineError: `cuda-python` is not installed, there is no GPU, or a call failed; every method too.
    """

    def __init__(self) -> None:
        try:
            self._cudart: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise EngineError(
                f"cuda-python is not installed ({error}); pip install cuda-python. Every other engine works without it"
            ) from error
        self._checked(self._cudart.cudaGetDeviceCount())

    def gpu(self) -> Gpu:
        """What GPU this is."""
        (properties,) = self._checked(self._cudart.cudaGetDeviceProperties(0))
        name = properties.name.split(b"\0")[0].decode(errors="replace")
        return Gpu(name, (properties.major, properties.minor))

    def device_memory(self, size: int) -> int:
        """`size` bytes on the GPU; see `free`."""
        (pointer,) = self._checked(self._cudart.cudaMalloc(size), size)
        return int(pointer)

    def pinned_memory(self, size: int) -> int:
        """`size` bytes of the host that the GPU copies from and to by itself; see `free_pinned`."""
        (pointer,) = self._checked(self._cudart.cudaMallocHost(size), size)
        return int(pointer)

    def free(self, pointer: int) -> None:
        """Give device memory back."""
        self._checked(self._cudart.cudaFree(pointer))

    def free_pinned(self, pointer: int) -> None:
        """Give pinned memory back."""
        self._checked(self._cudart.cudaFreeHost(pointer))

    def stream(self) -> Any:
        """A stream that waits for no other; see `destroy_stream`."""
        (stream,) = self._checked(self._cudart.cudaStreamCreateWithFlags(self._cudart.cudaStreamNonBlocking))
        return stream

    def synchronize(self, stream: Any) -> None:
        """Wait for all work on a stream."""
        self._checked(self._cudart.cudaStreamSynchronize(stream))

    def destroy_stream(self, stream: Any) -> None:
        """Give a stream back."""
        self._checked(self._cudart.cudaStreamDestroy(stream))

    def to_device(self, device: int, host: int, size: int, stream: Any) -> None:
        """Queue a copy of `size` bytes of pinned memory to the GPU."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._checked(self._cudart.cudaMemcpyAsync(device, host, size, kind, stream))

    def to_host(self, host: int, device: int, size: int, stream: Any) -> None:
        """Queue a copy of `size` bytes of the GPU to pinned memory."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self._cudart.cudaMemcpyAsync(host, device, size, kind, stream))

    def begin_capture(self, stream: Any) -> None:
        """What this thread queues on `stream` from now on is recorded instead of run."""
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._checked(self._cudart.cudaStreamBeginCapture(stream, mode))

    def end_capture(self, stream: Any) -> Any:
        """The recorded graph, ready to launch; see `destroy_graph`."""
        (graph,) = self._checked(self._cudart.cudaStreamEndCapture(stream))
        try:
            (executable,) = self._checked(self._cudart.cudaGraphInstantiate(graph, 0))
        finally:
            self._checked(self._cudart.cudaGraphDestroy(graph))
        return executable

    def launch(self, executable: Any, stream: Any) -> None:
        """Queue a recorded graph."""
        self._checked(self._cudart.cudaGraphLaunch(executable, stream))

    def destroy_graph(self, executable: Any) -> None:
        """Give a graph back."""
        self._checked(self._cudart.cudaGraphExecDestroy(executable))

    def _checked(self, result: tuple[Any, ...], size: int = 0) -> tuple[Any, ...]:
        """What a call returned, less its status."""
        status, *values = result
        if int(status) == 0:
            return tuple(values)
        if status.name in _NO_GPU:
            raise EngineError(
                f"no NVIDIA GPU can be used here: {self._text(status)}; on a machine that has one install its "
                "driver, or choose another engine"
            )
        if status.name == _OUT_OF_MEMORY:
            raise EngineError(f"out of GPU memory{self._shortage(size)}; {OUT_OF_MEMORY_ADVICE}")
        raise EngineError(f"CUDA failed: {self._text(status)} ({status.name})")

    def _text(self, status: Any) -> str:
        _, text = self._cudart.cudaGetErrorString(status)
        return text.decode(errors="replace")

    def _shortage(self, size: int) -> str:
        status, *values = self._cudart.cudaMemGetInfo()
        if int(status) != 0:
            return ""
        return f": {size / 2**20:.0f} MiB wanted, {values[0] / 2**20:.0f} of {values[1] / 2**20:.0f} free"


def host_array(pointer: int, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Host memory at `pointer` as an array; it must outlive the array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_uint8 * size).from_address(pointer)
    return np.ctypeslib.as_array(buffer).view(dtype).reshape(shape)
