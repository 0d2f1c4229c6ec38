"""ONNX Runtime's execution providers: what each is called, which wheel has it, and the options it takes.

Options are those of ONNX Runtime's documentation, page of the provider ("source"), that do something for a file whose
input and output are cveff's; what an option may be is checked before ONNX Runtime, which ignores some it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import EngineError
from .session import Choices

_DOCS = "https://onnxruntime.ai/docs/execution-providers/"
_SWITCH: Choices = (True, False)
_DEVICE: Choices = range(64)
_BYTES: Choices = range(1, 2**63)

_CUDA: dict[str, Choices] = {
    "device_id": _DEVICE,
    "gpu_mem_limit": _BYTES,
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "cudnn_conv_use_max_workspace": _SWITCH,
    "do_copy_in_default_stream": _SWITCH,
    "prefer_nhwc": _SWITCH,
    "use_tf32": _SWITCH,
}


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        name: as ONNX Runtime calls it.
        wheel: distribution that has it.
        source: page of ONNX Runtime's documentation that describes the options.
        options: what may be set, and to what.
        defaults: options that are set where the user does not.
        then: providers that take the nodes this one does not, in order; the CPU's is the last.
        device: where its tensors are, as `OrtValue` names it; "" where they are the CPU's.
        switch: how it reads an option that is off, and one that is on. TensorRT's refuses "0" and "1", and with what it
            refuses the whole session would go to the CPU.
    """

    name: str
    wheel: str
    source: str
    options: Mapping[str, Choices]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    then: tuple[str, ...] = ("CPUExecutionProvider",)
    device: str = ""
    switch: tuple[str, str] = ("0", "1")

    def require(self, available: list[str]) -> None:
        """Refuse where this installation of ONNX Runtime was built without the provider.

        Raises:
            EngineError: names the wheel that has it.
        """
        if self.name not in available:
            raise EngineError(
                f"this installation of ONNX Runtime has no {self.name} (it has {', '.join(available)}); "
                f"pip uninstall onnxruntime, then pip install {self.wheel}: only one of the two can be installed"
            )

    def listed(self, options: Mapping[str, Any]) -> list[Any]:
        """The `providers` of an `InferenceSession`: this one with its options, then those that take the rest."""
        given = {**self.defaults, **options}
        own = {key: self._text(value) for key, value in given.items() if key in self.options}
        shared = {"device_id": own["device_id"]} if "device_id" in own else {}
        rest = [(name, shared) if name == "CUDAExecutionProvider" else name for name in self.then]
        return [(self.name, own), *rest]

    def _text(self, value: Any) -> str:
        return self.switch[value] if isinstance(value, bool) else str(value)


PROVIDERS: Mapping[str, Provider] = {
    "onnxruntime-cuda": Provider(
        "CUDAExecutionProvider",
        "onnxruntime-gpu",
        _DOCS + "CUDA-ExecutionProvider.html",
        _CUDA,
        # The exhaustive search, ONNX Runtime's default, is repeated for every batch size that comes.
        {"cudnn_conv_algo_search": "HEURISTIC"},
        device="cuda",
        switch=("False", "True"),
    ),
    "onnxruntime-tensorrt": Provider(
        "TensorrtExecutionProvider",
        "onnxruntime-gpu",
        _DOCS + "TensorRT-ExecutionProvider.html",
        {
            "device_id": _DEVICE,
            "trt_max_workspace_size": _BYTES,
            "trt_min_subgraph_size": range(1, 2**31),
            "trt_fp16_enable": _SWITCH,
            "trt_bf16_enable": _SWITCH,
            "trt_int8_enable": _SWITCH,
            "trt_builder_optimization_level": range(6),
            "trt_sparsity_enable": _SWITCH,
            "trt_dla_enable": _SWITCH,
            "trt_dla_core": range(8),
            "trt_engine_cache_enable": _SWITCH,
            "trt_engine_cache_path": str,
            "trt_timing_cache_enable": _SWITCH,
            "trt_timing_cache_path": str,
            # One shape an input, "images:1x224x224x3": without them an engine is built again for every larger batch.
            "trt_profile_min_shapes": str,
            "trt_profile_opt_shapes": str,
            "trt_profile_max_shapes": str,
        },
        then=("CUDAExecutionProvider", "CPUExecutionProvider"),
        device="cuda",
        switch=("False", "True"),
    ),
    "onnxruntime-coreml": Provider(
        "CoreMLExecutionProvider",
        "onnxruntime",  # the wheel for macOS
        _DOCS + "CoreML-ExecutionProvider.html",
        {
            "ModelFormat": ("MLProgram", "NeuralNetwork"),
            "MLComputeUnits": ("ALL", "CPUOnly", "CPUAndGPU", "CPUAndNeuralEngine"),
            "RequireStaticInputShapes": _SWITCH,
            "EnableOnSubgraphs": _SWITCH,
            "SpecializationStrategy": ("Default", "FastPrediction"),
            "AllowLowPrecisionAccumulationOnGPU": _SWITCH,
            "ModelCacheDirectory": str,
        },
        {"ModelFormat": "MLProgram"},  # the older format has fewer operators
    ),
    "onnxruntime-qnn": Provider(
        "QNNExecutionProvider",
        "onnxruntime-qnn",
        _DOCS + "QNN-ExecutionProvider.html",
        {
            "backend_type": ("htp", "gpu", "cpu"),
            "backend_path": str,
            "htp_performance_mode": (
                "default",
                "burst",
                "balanced",
                "high_performance",
                "high_power_saver",
                "low_balanced",
                "low_power_saver",
                "power_saver",
                "sustained_high_performance",
            ),
            "htp_graph_finalization_optimization_mode": ("0", "1", "2", "3"),
            "qnn_context_priority": ("low", "normal", "normal_high", "high"),
            "rpc_control_latency": range(2**31),
            "vtcm_mb": range(2**15),
            "soc_model": str,
            "htp_arch": str,
            "device_id": _DEVICE,
            "enable_htp_fp16_precision": _SWITCH,
            "offload_graph_io_quantization": _SWITCH,
        },
    ),
}
"""By the name of the engine."""
