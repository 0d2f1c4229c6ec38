"""ONNX files on ONNX Runtime: its CPU engine, or one of its execution providers (`onnx_providers`)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import EngineError
from .onnx_binding import BoundCalls
from .onnx_providers import PROVIDERS, Provider
from .onnx_types import harmful_rewrites, stored_types
from .session import Choices, Session, check_options, engine_message

OPTIONS: Mapping[str, Choices] = {"graph_optimizations": (True, False)}
PROVIDER_OPTIONS: Mapping[str, Choices] = {**OPTIONS, "batch": range(1, 2**16)}

BATCH_DIMENSION = "batch"
"""What `cveff.export` calls the dimension that it leaves open."""
_ASSIGNMENT = "session.record_ep_graph_assignment_info"


class OnnxSession(Session):
    """An `.onnx` file on ONNX Runtime.

    Options:
        graph_optimizations: False computes the graph exactly as written, so that quantize/dequantize pairs
            are evaluated in floating point: what an int8 file means, as opposed to what integer kernels do.
        batch: with a provider, the only batch size that will come: some (QNN, CoreML) take no open dimension.
        Others are the provider's (`onnx_providers`).

    Args:
        engine: "onnxruntime", or a name in `PROVIDERS`. What the provider does not take runs on the CPU, and `notes`
            says what that is.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        options: Mapping[str, Any] | None = None,
        engine: str = "onnxruntime",
    ) -> None:
        super().__init__(path, threads)
        self.engine = engine
        provider = PROVIDERS.get(engine)
        known = OPTIONS if provider is None else {**PROVIDER_OPTIONS, **provider.options}
        chosen = check_options(engine, options, known)
        try:
            import onnxruntime
        except ImportError as error:
            wheel = "onnxruntime" if provider is None else provider.wheel
            raise EngineError(f"ONNX Runtime is not installed ({error}); pip install {wheel}") from error
        if provider is not None:
            provider.require(onnxruntime.get_available_providers())
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        if not chosen.get("graph_optimizations", True):
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if provider is not None:
            settings.add_session_config_entry(_ASSIGNMENT, "1")
        if "batch" in chosen:
            settings.add_free_dimension_override_by_name(BATCH_DIMENSION, chosen["batch"])
        providers = ["CPUExecutionProvider"] if provider is None else provider.listed(chosen)
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path),
                sess_options=settings,
                providers=providers,
                disabled_optimizers=harmful_rewrites(stored_types(path)),
            )
        except Exception as error:  # its exceptions share no base class below Exception
            raise EngineError(f"ONNX Runtime cannot open {path}: {engine_message(error)}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        output = next((item for item in outputs if item.name == "logits"), outputs[0])
        self._input, self._output = (inputs[0].name if inputs else ""), [output.name]
        self._outputs = [item.name for item in outputs]
        self.output_names = tuple(self._outputs)
        self._describe(
            [(item.name, [_dimension(size) for size in item.shape]) for item in inputs],
            inputs[0].type.removeprefix("tensor(").removesuffix(")") if inputs else "",
            [_dimension(size) for size in output.shape or ()],
        )
        self._bound: BoundCalls | None = None
        self._lock = threading.Lock()  # buffers on a device are shared: one caller at a time
        if provider is not None:
            self._started(provider, chosen)
            if provider.device and self.num_classes is not None:
                self._bound = BoundCalls(
                    onnxruntime,
                    self._session,
                    self._input,
                    output.name,
                    self.num_classes,
                    provider.device,
                    chosen.get("device_id", 0),
                )

    def _started(self, provider: Provider, options: Mapping[str, Any]) -> None:
        """Refuse a session that quietly became the CPU's, and note what runs there anyway."""
        if provider.name not in self._session.get_providers():
            raise EngineError(
                f"ONNX Runtime could not start {provider.name}, and would have used the CPU; libraries or a driver "
                f"that it needs are missing or of another version: {provider.source} lists them"
            )
        self._session.disable_fallback()  # an error later would start it again on the CPU alone
        if options.get("batch") not in (None, self.batch):
            raise EngineError(
                f"{self.path} has no open dimension called {BATCH_DIMENSION!r}, so its batch cannot be set to "
                f"{options['batch']}; leave the option out, or export the file with cveff"
            )
        elsewhere = _elsewhere(self._session, provider.name)
        if elsewhere:
            kinds = ", ".join(sorted(set(elsewhere)))
            self.notes = (f"{len(elsewhere)} nodes of {self.path.name} are not on {provider.name}: {kinds}",)

    def metadata(self) -> dict[str, str]:
        """The file's `metadata_props`."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def _run(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self._infer(self._output, images)[0], np.float32)

    def _run_all(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._infer(self._outputs, images), strict=True))

    def _run_carried(self, values: list[np.ndarray]) -> dict[str, np.ndarray]:
        feed = dict(zip(self.carried, values, strict=True))
        return dict(zip(self._outputs, self._infer(self._outputs, feed), strict=True))

    def _infer(self, names: list[str], images: np.ndarray | dict[str, np.ndarray]) -> list[np.ndarray]:
        if self._session is None:
            raise EngineError(f"{self.path.name} was closed; open it again")
        try:
            if self._bound is not None and names == self._output and isinstance(images, np.ndarray):
                with self._lock:
                    return [self._bound(images)]
            feed = images if isinstance(images, dict) else {self._input: images}
            values: list[np.ndarray] = self._session.run(names, feed)
            return values
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime failed while running {self.path}: {engine_message(error)}"
            ) from error

    def _release(self) -> None:
        self._session = self._bound = None


def _dimension(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _elsewhere(session: Any, provider: str) -> list[str]:
    """Operators of the nodes that another provider runs; none before ONNX Runtime 1.24, which does not tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    return [
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
    ]
