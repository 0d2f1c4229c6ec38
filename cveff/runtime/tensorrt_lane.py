"""Execution contexts of a TensorRT engine, each with its own stream and buffers, and a pool of them for threads.

A batch size that comes again gets a CUDA graph: its kernels are launched as one. A graph belongs to the state its
context was in when it was recorded, so that context runs no other size from then on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cuda import Cuda, host_array
from .errors import EngineError

_log = logging.getLogger(__name__)

MAX_LANES = 4
"""Contexts at most, each with its own intermediate values in the GPU's memory; one always takes any batch size."""


@dataclass(frozen=True)
class Tensors:
    """What an engine takes and gives.

    Attributes:
        images, logits: names of its tensors.
        image: (H, W, C); `classes`: width of the logits.
        most: most images a call.
    """

    images: str
    logits: str
    image: tuple[int, int, int]
    classes: int
    most: int


class Lane:
    """One execution context, a stream, and pinned and device buffers for the most images a call.

    Raises:
        EngineError: out of GPU memory, or a call failed; every method too.
    """

    def __init__(self, cuda: Cuda, engine: Any, tensors: Tensors, failure: Callable[[], str]) -> None:
        self.batch: int | None = None
        """The only batch size it takes; None: any."""
        self._cuda, self._tensors, self._failure = cuda, tensors, failure
        self._graph: Any = None
        self._last = 0
        self._memory: list[tuple[Callable[[int], None], int]] = []
        self._image_bytes = int(np.prod(tensors.image))
        self._logit_bytes = 4 * tensors.classes
        self._stream = cuda.stream()
        try:
            self._context: Any = engine.create_execution_context()
            if self._context is None:
                raise EngineError(f"TensorRT made no execution context: {failure()}")
            self._pixels, self._pixels_there = self._buffers(tensors.most * self._image_bytes)
            self._answers, self._answers_there = self._buffers(tensors.most * self._logit_bytes)
            for name, address in (
                (tensors.images, self._pixels_there),
                (tensors.logits, self._answers_there),
            ):
                if not self._context.set_tensor_address(name, address):
                    raise EngineError(f"TensorRT refused the memory of {name}: {failure()}")
        except EngineError:
            self.close()
            raise
        self._pixel_view = host_array(self._pixels, (tensors.most, *tensors.image), np.uint8)
        self._logit_view = host_array(self._answers, (tensors.most, tensors.classes), np.float32)

    def submit(self, images: np.ndarray) -> None:
        """Queue a batch; the images (N, H, W, C) uint8 may be changed afterwards."""
        size = len(images)
        self._pixel_view[:size] = images
        if self._graph is not None:
            self._cuda.launch(self._graph, self._stream)
            return
        if size != self._last:
            shape = (size, *self._tensors.image)
            if not self._context.set_input_shape(self._tensors.images, shape):
                raise EngineError(f"TensorRT refused images of shape {shape}: {self._failure()}")
        self._queue(size)

    def collect(self, size: int) -> np.ndarray:
        """Logits (size, classes) float32 of the batch that was submitted last; waits for them."""
        self._cuda.synchronize(self._stream)
        logits = self._logit_view[:size].copy()
        self._last = size
        return logits

    def has_seen(self, size: int) -> bool:
        """Whether the batch before was of this size."""
        return self._last == size

    def specialise(self, size: int) -> None:
        """Record the graph of `size`, which ran last: from now on the lane takes no other.

        Networks with loops or conditions cannot be recorded; the lane is of no use then.
        """
        self._cuda.begin_capture(self._stream)
        try:
            self._queue(size)
        finally:
            graph = self._cuda.end_capture(self._stream)
        self._graph, self.batch = graph, size

    def close(self) -> None:
        """Give everything back."""
        if self._graph is not None:
            self._cuda.destroy_graph(self._graph)
        self._graph = self._context = None
        while self._memory:
            free, pointer = self._memory.pop()
            free(pointer)
        self._cuda.destroy_stream(self._stream)

    def _queue(self, size: int) -> None:
        self._cuda.to_device(self._pixels_there, self._pixels, size * self._image_bytes, self._stream)
        if not self._context.execute_async_v3(int(self._stream)):
            raise EngineError(f"TensorRT failed while running: {self._failure()}")
        self._cuda.to_host(self._answers, self._answers_there, size * self._logit_bytes, self._stream)

    def _buffers(self, size: int) -> tuple[int, int]:
        """Pinned and device memory."""
        pinned = self._cuda.pinned_memory(size)
        self._memory.append((self._cuda.free_pinned, pinned))
        device = self._cuda.device_memory(size)
        self._memory.append((self._cuda.free, device))
        return pinned, device


class Lanes:
    """A pool of lanes, safe from several threads. They are made when they are needed, up to `MAX_LANES`."""

    def __init__(self, make: Callable[[], Lane]) -> None:
        self._make = make
        self._idle: list[Lane] = [make()]
        self._count = 1
        self._records = True
        self._num_special = 0
        self._changed = threading.Condition()
        self._closed = False

    def take(self, size: int, *, wait: bool) -> Lane | None:
        """A lane that can run a batch of `size`; None where all are busy and `wait` is False.

        Raises:
            EngineError: closed, or no lane could be made.
        """
        with self._changed:
            while True:
                if self._closed:
                    raise EngineError("the session was closed; open it again")
                fitting = [lane for lane in self._idle if lane.batch in (size, None)]
                if fitting:
                    lane = max(fitting, key=lambda lane: (lane.batch == size, lane.has_seen(size)))
                    self._idle.remove(lane)
                    return lane
                if self._count < MAX_LANES:
                    self._count += 1
                    break
                if not wait:
                    return None
                self._changed.wait()
        try:
            return self._make()
        except EngineError:
            self._forget()
            raise

    def give_back(self, lane: Lane, size: int, *, comes_again: bool) -> None:
        """Return a lane that has run a batch of `size`.

        Args:
            comes_again: the batch before on this lane was of that size too.
        """
        if comes_again and lane.batch is None and self._may_specialise():
            try:
                lane.specialise(size)
            except EngineError as error:
                self._records = False
                _log.info("kernels are launched one by one, a CUDA graph cannot be recorded: %s", error)
                self.discard(lane)
                return
        with self._changed:
            if not self._closed:
                self._idle.append(lane)
                self._changed.notify_all()
                return
        self.discard(lane)

    def discard(self, lane: Lane) -> None:
        """Close a lane that failed, or that is needed no more."""
        with self._changed:
            self._num_special -= lane.batch is not None
        lane.close()
        self._forget()

    def close(self) -> None:
        """Close every lane; those in use are closed when they come back."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for lane in idle:
            self.discard(lane)

    def _may_specialise(self) -> bool:
        with self._changed:
            if not self._records or self._num_special >= MAX_LANES - 1:
                return False
            self._num_special += 1
            return True

    def _forget(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()
