"""Calls of ONNX Runtime with buffers that stay on the device: one copy in, one copy out, nothing allocated."""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_SIZES = 4
"""Batch sizes that keep buffers; the one that has waited longest makes room."""


class BoundCalls:
    """Runs a session on a device's buffers, one pair for each batch size. One caller at a time.

    Args:
        runtime: the module `onnxruntime`.
        session: its `InferenceSession`.
        input, output: names of the two tensors.
        num_classes: width of the logits.
        device: "cuda" or "cpu", and `device_id` which of them.
    """

    def __init__(
        self,
        runtime: Any,
        session: Any,
        input: str,
        output: str,
        num_classes: int,
        device: str,
        device_id: int = 0,
    ) -> None:
        self._runtime, self._session = runtime, session
        self._input, self._output, self._num_classes = input, output, num_classes
        self._where = (device, device_id)
        self._bound: dict[tuple[int, ...], tuple[Any, Any, Any]] = {}  # by the shape of the batch

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, classes) float32 of `images` (N, H, W, C) uint8, contiguous."""
        bound = self._bound.pop(images.shape, None) or self._bind(images.shape)
        self._bound[images.shape] = bound  # the last used is last
        binding, pixels, logits = bound
        pixels.update_inplace(images)
        self._session.run_with_iobinding(binding)
        return np.array(logits.numpy(), np.float32)

    def _bind(self, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
        while len(self._bound) >= MAX_SIZES:
            del self._bound[next(iter(self._bound))]
        create = self._runtime.OrtValue.ortvalue_from_shape_and_type
        pixels = create(shape, np.uint8, *self._where)
        logits = create((shape[0], self._num_classes), np.float32, *self._where)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input, pixels)
        binding.bind_ortvalue_output(self._output, logits)
        return binding, pixels, logits
