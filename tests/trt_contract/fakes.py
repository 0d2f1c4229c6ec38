"""Answers of a small imaginary engine, so that what is copied, split and repeated can be followed.

It takes images (N, 4, 6, 3) and gives (N, 2): the sum of an image's values, and its first value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cveff.runtime.cuda import host_array

from .cuda_recorder import CudaRecorder
from .recorder import World

IMAGE = (4, 6, 3)


def expected(images: np.ndarray) -> np.ndarray:
    """What the engine gives."""
    flat = images.reshape(len(images), int(np.prod(IMAGE))).astype(np.float32)
    return np.stack([flat.sum(axis=1), flat[:, 0]], axis=1)


def builder_answers(batch: int = -1) -> dict[str, Any]:
    """A file with one input whose parser finds nothing wrong, and a plan."""
    return {
        "OnnxParser.parse_from_file": True,
        "INetworkDefinition.num_inputs": 1,
        "ITensor.name": "images",
        "ITensor.shape": (batch, *IMAGE),
        "Builder.num_DLA_cores": 2,
        "IHostMemory.bytes": b"plan or timings",
    }


def engine_answers(
    world: World, cuda: CudaRecorder, batches: tuple[int, int, int], batch: int = -1
) -> Mapping[str, Any]:
    """An engine whose contexts compute `expected`."""
    module = world.module

    def set_input_shape(context: Any, name: str, shape: tuple[int, ...]) -> bool:
        object.__setattr__(context, "_shape", shape)
        return batches[0] <= shape[0] <= batches[2]

    def set_tensor_address(context: Any, name: str, address: int) -> bool:
        object.__setattr__(context, f"_{name}", address)
        return True

    def execute(context: Any, stream: int) -> bool:
        queued = context._shape

        def work() -> None:
            assert context._shape == queued, "a context changed after its graph was recorded"
            images = host_array(context._images, queued, np.uint8)
            host_array(context._logits, (queued[0], 2), np.float32)[:] = expected(images)

        cuda.queue(work)
        return True

    names = ["images", "logits"]
    return {
        "ICudaEngine.num_io_tensors": 2,
        "ICudaEngine.get_tensor_name": lambda engine, index: names[index],
        "ICudaEngine.get_tensor_mode": lambda engine, name: (
            module.TensorIOMode.INPUT if name == "images" else module.TensorIOMode.OUTPUT
        ),
        "ICudaEngine.get_tensor_shape": lambda engine, name: (
            (batch, *IMAGE) if name == "images" else (batch, 2)
        ),
        "ICudaEngine.get_tensor_dtype": lambda engine, name: (
            module.DataType.UINT8 if name == "images" else module.DataType.FLOAT
        ),
        "ICudaEngine.get_tensor_profile_shape": lambda engine, name, index: [
            (size, *IMAGE) for size in batches
        ],
        "IExecutionContext.set_input_shape": set_input_shape,
        "IExecutionContext.set_tensor_address": set_tensor_address,
        "IExecutionContext.execute_async_v3": execute,
    }
