"""OpenVINO IR (`.xml` beside `.bin`) and ONNX files on OpenVINO's CPU engine.

OpenVINO runs a network compiled for one batch size faster than the same network left open to any, and in int8 the
two answer a little differently (measured: "static_batch" in model_zoo/results/choices.json). So every call runs on
networks compiled for a size, and an image gets the same logits in whatever batch it comes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import EngineError
from .session import Choices, Session, check_options, engine_message

OPTIONS: Mapping[str, Choices] = {
    "inference_precision": ("f32", "bf16", "f16"),
    "performance_hint": ("latency", "throughput"),
    "streams": range(1, 1025),
}

MAX_SPECIALISED = 4
"""Batch sizes that get their own compiled network, each with its own copy of the weights; and size 1."""


class OpenVinoSession(Session):
    """An `.xml` or `.onnx` file on OpenVINO.

    The network is compiled when it is first called, for that batch size, and for another size when that
    comes twice in a row. A size that does not, as the last batch of a set, is run in parts of compiled sizes.

    Options:
        inference_precision: arithmetic of the parts that are not int8. Always set, "f32" by default: left
            alone, OpenVINO computes in bfloat16 or float16 where the processor can, and does not say so.
        performance_hint: "latency" (the default) runs a batch on all threads together. "throughput" divides the
            threads into streams and a batch among them: for batches, and never for single images.
        streams: how many with "throughput"; by default one a thread, and never more.
    """

    engine = "openvino"

    def __init__(self, path: Path, threads: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, threads)
        chosen = check_options(self.engine, options, OPTIONS)
        hint = chosen.get("performance_hint", "latency")
        if hint == "latency" and "streams" in chosen:
            raise EngineError(
                'option streams of openvino goes with performance_hint "throughput"; leave it out'
            )
        self._streams = 1 if hint == "latency" else min(chosen.get("streams", threads), threads)
        try:
            import openvino
        except ImportError as error:
            raise EngineError(f"OpenVINO is not installed ({error}); pip install openvino") from error
        self._settings = {
            "PERFORMANCE_HINT": hint.upper(),
            "NUM_STREAMS": str(self._streams),
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": chosen.get("inference_precision", "f32"),
        }
        try:
            # No CACHE_DIR: a compiled network written beside the file would change a bundle that is opened.
            self._core: Any = openvino.Core()
            self._model: Any = self._core.read_model(str(path))
        except Exception as error:  # RuntimeError, and whatever the reader of the format raises
            raise EngineError(f"OpenVINO cannot open {path}: {engine_message(error)}") from error
        inputs, outputs = self._model.inputs, self._model.outputs
        output = next((item for item in outputs if "logits" in item.get_names()), outputs[0])
        self._output = outputs.index(output)
        self._names = [_name(item) for item in outputs]
        self.output_names = tuple(self._names)
        self._requests: dict[int, Any] = {}  # by batch size, one request for each stream
        self._last_batch = 0
        self._lock = threading.Lock()  # an infer request holds its own buffers: one caller at a time
        self._describe(
            [(_name(item), _dimensions(item)) for item in inputs],
            _dtype(inputs[0]) if inputs else "",
            _dimensions(output),
        )

    def _run(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self._run_outputs([images], [self._output])[0], np.float32)

    def _run_all(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self._run_carried([images])

    def _run_carried(self, values: list[np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._run_outputs(values, range(len(self._names))), strict=True))

    def _run_outputs(self, inputs: list[np.ndarray], indices: Sequence[int]) -> list[np.ndarray]:
        """Those outputs of a batch, run in parts, each an array of its own."""
        with self._lock:
            if self._model is None:
                raise EngineError(f"{self.path.name} was closed; open it again")
            try:
                parts, start = [], 0
                for size, count in self._rounds(len(inputs[0])):
                    stop = start + size * count
                    split = [np.split(values[start:stop], count) for values in inputs]
                    parts += self._infer([list(part) for part in zip(*split, strict=True)], indices)
                    start = stop
            except Exception as error:
                raise EngineError(
                    f"OpenVINO failed while running {self.path}: {engine_message(error)}"
                ) from error
        return parts[0] if len(parts) == 1 else [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _rounds(self, batch: int) -> list[tuple[int, int]]:
        """(size, count): parts of one size, as many as there are streams or fewer, that run at once."""
        if self.batch is not None:
            return [(batch, 1)]
        share, rest = divmod(batch, self._streams)
        rounds = [(size, self._streams) for size in self._parts(share)] if share else []
        return [*rounds, (1, rest)] if rest else rounds

    def _parts(self, batch: int) -> list[int]:
        """The sizes, together `batch`, in which a stream runs its share."""
        comes_again = not self._requests or batch == self._last_batch
        self._last_batch = batch
        if batch in self._requests or (comes_again and len(self._requests) < MAX_SPECIALISED):
            return [batch]
        parts: list[int] = []
        for size in sorted({1, *self._requests}, reverse=True):
            count, batch = divmod(batch, size)
            parts += [size] * count
        return parts

    def _infer(self, parts: list[list[np.ndarray]], indices: Sequence[int]) -> list[list[np.ndarray]]:
        """Those outputs of parts of one size, that run at once."""
        size = len(parts[0][0])
        requests = self._requests.get(size)
        if requests is None:
            requests = self._requests[size] = self._compile(size)
        running = requests[: len(parts)]
        if len(parts) == 1:
            running[0].infer(parts[0], share_inputs=True)
        else:
            for request, part in zip(running, parts, strict=True):
                request.start_async(part, share_inputs=True)
            for request in running:
                request.wait()
        return [[np.array(request.get_output_tensor(index).data) for index in indices] for request in running]

    def _compile(self, batch: int) -> list[Any]:
        model = self._model
        if self.batch is None:
            model = model.clone()
            open_sizes = {port: _dimensions(port)[1:] for port in model.inputs}
            model.reshape(
                {
                    port: [batch, *(-1 if size is None else size for size in sizes)]
                    for port, sizes in open_sizes.items()
                }
            )
        compiled = self._core.compile_model(model, "CPU", self._settings)
        return [compiled.create_infer_request() for _ in range(self._streams)]

    def _release(self) -> None:
        with self._lock:
            self._requests.clear()
            self._model = None


def _name(port: Any) -> str:
    return min(port.get_names(), default="an unnamed tensor")


def _dtype(port: Any) -> str:
    name = port.get_element_type().get_type_name()
    return "uint8" if name == "u8" else name


def _dimensions(port: Any) -> list[int | None]:
    shape = port.get_partial_shape()
    if shape.rank.is_dynamic:
        return []
    return [size.get_length() if size.is_static else None for size in shape]
