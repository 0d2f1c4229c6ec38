"""ONNX files on ONNX Runtime's CPU engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import EngineError
from .session import Session, check_options, engine_message

OPTIONS = {"graph_optimizations": (True, False)}


class OnnxSession(Session):
    """An `.onnx` file on ONNX Runtime.

    Options:
        graph_optimizations: False computes the graph exactly as written, so that quantize/dequantize pairs
            are evaluated in floating point: what an int8 file means, as opposed to what integer kernels do.
    """

    engine = "onnxruntime"

    def __init__(self, path: Path, threads: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, threads)
        chosen = check_options(self.engine, options, OPTIONS)
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineError(f"ONNX Runtime is not installed ({error}); pip install onnxruntime") from error
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        if not chosen.get("graph_optimizations", True):
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), sess_options=settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions share no base class below Exception
            raise EngineError(f"ONNX Runtime cannot open {path}: {engine_message(error)}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        output = next((item for item in outputs if item.name == "logits"), outputs[0])
        self._input, self._output = (inputs[0].name if inputs else ""), [output.name]
        self._outputs = [item.name for item in outputs]
        self._describe(
            [(item.name, [_dimension(size) for size in item.shape]) for item in inputs],
            inputs[0].type.removeprefix("tensor(").removesuffix(")") if inputs else "",
            [_dimension(size) for size in output.shape or ()],
        )

    def metadata(self) -> dict[str, str]:
        """The file's `metadata_props`."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def _run(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self._infer(self._output, images)[0], np.float32)

    def _run_all(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._infer(self._outputs, images), strict=True))

    def _infer(self, names: list[str], images: np.ndarray) -> list[np.ndarray]:
        if self._session is None:
            raise EngineError(f"{self.path.name} was closed; open it again")
        try:
            values: list[np.ndarray] = self._session.run(names, {self._input: images})
            return values
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime failed while running {self.path}: {engine_message(error)}"
            ) from error

    def _release(self) -> None:
        self._session = None


def _dimension(size: Any) -> int | None:
    return size if isinstance(size, int) else None
