"""Measuring anything that is callable on a batch: accuracy, latency, memory, parity, size.

A **predictor** is any callable that takes a uint8 NHWC batch and returns float32 logits (N, classes): a torch
module wrapped by `torch_predictor`, an exported file opened by `cveff.runtime`, a plain function. Names
load on first use, so that the memory probe's child process can live in this package without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cveff.measure.accuracy import (
        Accuracy,
        Change,
        agreement,
        change,
        confusion,
        evaluate,
        per_class_accuracy,
        predict,
        top1,
        topk,
        wilson_interval,
    )
    from cveff.measure.latency import Latency, LatencyResult, Ratio, compare
    from cveff.measure.meaning import MeaningGap, meaning_gap
    from cveff.measure.memory import Memory, peak_memory
    from cveff.measure.onnx_modules import read_modules, write_modules
    from cveff.measure.onnx_parity import layer_parity
    from cveff.measure.openvino_parity import openvino_layer_parity
    from cveff.measure.parity import (
        LayerParity,
        cosine,
        first_large_difference,
        largest_rise,
        relative_difference,
    )
    from cveff.measure.predictor import Predictor, module_predictor, torch_predictor
    from cveff.measure.size import module_bytes, size_bytes
    from cveff.measure.threads import pinned_threads, usable_cores
    from cveff.measure.torch_parity import module_parity

_HOME = {
    "Accuracy": "accuracy",
    "Change": "accuracy",
    "Latency": "latency",
    "LatencyResult": "latency",
    "LayerParity": "parity",
    "MeaningGap": "meaning",
    "Memory": "memory",
    "Predictor": "predictor",
    "Ratio": "latency",
    "agreement": "accuracy",
    "change": "accuracy",
    "compare": "latency",
    "confusion": "accuracy",
    "cosine": "parity",
    "evaluate": "accuracy",
    "first_large_difference": "parity",
    "largest_rise": "parity",
    "layer_parity": "onnx_parity",
    "meaning_gap": "meaning",
    "module_bytes": "size",
    "module_parity": "torch_parity",
    "module_predictor": "predictor",
    "openvino_layer_parity": "openvino_parity",
    "peak_memory": "memory",
    "per_class_accuracy": "accuracy",
    "pinned_threads": "threads",
    "predict": "accuracy",
    "read_modules": "onnx_modules",
    "relative_difference": "parity",
    "size_bytes": "size",
    "top1": "accuracy",
    "topk": "accuracy",
    "torch_predictor": "predictor",
    "usable_cores": "threads",
    "wilson_interval": "accuracy",
    "write_modules": "onnx_modules",
}

__all__ = [
    "Accuracy",
    "Change",
    "Latency",
    "LatencyResult",
    "LayerParity",
    "MeaningGap",
    "Memory",
    "Predictor",
    "Ratio",
    "agreement",
    "change",
    "compare",
    "confusion",
    "cosine",
    "evaluate",
    "first_large_difference",
    "largest_rise",
    "layer_parity",
    "meaning_gap",
    "module_bytes",
    "module_parity",
    "module_predictor",
    "openvino_layer_parity",
    "peak_memory",
    "per_class_accuracy",
    "pinned_threads",
    "predict",
    "read_modules",
    "relative_difference",
    "size_bytes",
    "top1",
    "topk",
    "torch_predictor",
    "usable_cores",
    "wilson_interval",
    "write_modules",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cveff.measure' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cveff.measure.{_HOME[name]}"), name)
