"""OpenVINO IR (`.xml` beside `.bin`) and ONNX files on OpenVINO's CPU engine."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import EngineError
from .session import Session, check_options, first_line

OPTIONS = {"inference_precision": ("f32", "bf16", "f16")}


class OpenVinoSession(Session):
    """An `.xml` or `.onnx` file on OpenVINO.

    Options:
        inference_precision: arithmetic of the parts that are not int8. Always set, "f32" by default: left
            alone, OpenVINO computes in bfloat16 or float16 where the processor can, and does not say so.
    """

    engine = "openvino"

    def __init__(self, path: Path, threads: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, threads)
        chosen = check_options(self.engine, options, OPTIONS)
        try:
            import openvino
        except ImportError as error:
            raise EngineError(f"OpenVINO is not installed ({error}); pip install openvino") from error
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": chosen.get("inference_precision", "f32"),
        }
        try:
            # No CACHE_DIR: a compiled model written beside the file would change a bundle that is opened.
            model = openvino.Core().read_model(str(path))
            inputs, outputs = model.inputs, model.outputs
            output = next((item for item in outputs if "logits" in item.get_names()), outputs[0])
            self._describe(
                [(_name(item), _dimensions(item)) for item in inputs],
                _dtype(inputs[0]) if inputs else "",
                _dimensions(output),
            )
            self._output = outputs.index(output)
            self._request: Any = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        except EngineError:
            raise
        except Exception as error:  # RuntimeError, and whatever the reader of the format raises
            raise EngineError(f"OpenVINO cannot open {path}: {first_line(error)}") from error
        self._lock = threading.Lock()  # an infer request holds its own buffers: one caller at a time

    def _run(self, images: np.ndarray) -> np.ndarray:
        with self._lock:
            if self._request is None:
                raise EngineError(f"{self.path.name} was closed; open it again")
            try:
                self._request.infer([images], share_inputs=True)
                return np.array(self._request.get_output_tensor(self._output).data, np.float32)
            except Exception as error:
                raise EngineError(
                    f"OpenVINO failed while running {self.path}: {first_line(error)}"
                ) from error

    def _release(self) -> None:
        self._request = None


def _name(port: Any) -> str:
    return min(port.get_names(), default="an unnamed input")


def _dtype(port: Any) -> str:
    name = port.get_element_type().get_type_name()
    return "uint8" if name == "u8" else name


def _dimensions(port: Any) -> list[int | None]:
    shape = port.get_partial_shape()
    if shape.rank.is_dynamic:
        return []
    return [size.get_length() if size.is_static else None for size in shape]
