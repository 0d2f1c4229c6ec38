"""Parity layer by layer between an ONNX file and an OpenVINO IR made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cveff.errors import CveffError, EngineError, MissingDependencyError
from cveff.measure._onnx_graph import Exposed, Graph
from cveff.measure.onnx_parity import compare_runs
from cveff.measure.parity import LayerParity
from cveff.measure.threads import usable_cores
from cveff.runtime.errors import first_line


def openvino_layer_parity(
    reference_onnx: str | Path,
    other: str | Path,
    images: np.ndarray,
    *,
    inference_precision: str = "f32",
    threads: int | None = None,
) -> list[LayerParity]:
    """Compare every activation whose ONNX name the IR still carries, in the order of the ONNX graph.

    Where the IR quantizes an activation, the value after its FakeQuantize is read. Activations are read by
    adding outputs to the graph, which undoes some of the engine's fusions: the layers indicate where a
    difference starts, the logits' own difference should be measured on the untouched file.

    Args:
        reference_onnx: run with ONNX Runtime as written. other: `.xml` (IR) or `.onnx`, run with OpenVINO.
        images: uint8 (N, H, W, C).
        inference_precision: "f32" or "bf16".
        threads: of both engines; by default every core.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        EngineError: a file cannot be opened or run.
        CveffError: no activation has the same name in both.
    """
    threads = threads or usable_cores()
    graph = Graph(reference_onnx)
    reference = Exposed(graph, graph.activations, graph_optimizations=False, threads=threads)
    compiled, names = _compile(Path(other), reference.available, inference_precision, threads)
    output = graph.outputs[0]
    if not names:
        raise CveffError(
            f"{reference_onnx} and {other} have no tensor name in common; convert the IR from this file"
        )

    def run(chunk: np.ndarray) -> dict[str, np.ndarray]:
        try:
            values = compiled([chunk])
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed on {other}: {first_line(error)}") from error
        return {name: np.asarray(values[index], dtype=np.float32) for name, index in names.items()}

    wanted = sorted(names, key=lambda name: name == output)
    return compare_runs(graph, wanted, lambda chunk: reference.run(chunk, wanted), run, images)


def _compile(
    path: Path, tensors: tuple[str, ...], precision: str, threads: int
) -> tuple[Any, dict[str, int]]:
    """The compiled model with extra outputs, and tensor name -> index among its outputs."""
    try:
        import openvino
    except ImportError:
        raise MissingDependencyError("OpenVINO is not installed; pip install 'cveff[openvino]'") from None
    if not path.is_file():
        raise EngineError(f"{path} does not exist; check the path")
    wanted = set(tensors)
    try:
        core = openvino.Core()
        model = core.read_model(path)
        names = {
            name: index for index, result in enumerate(model.outputs) for name in result.get_names() & wanted
        }
        nodes = [node for node in model.get_ordered_ops() if node.get_type_name() != "Result"]
        is_quantized = any(node.get_type_name() == "FakeQuantize" for node in nodes)
        # In a quantized graph only what a FakeQuantize alone reads: an output between a convolution and the
        # ReLU fused with it makes OpenVINO 2026.4 return zeros from there on.
        found = {
            name: _after_quantization(output)
            for node in nodes
            for output in node.outputs()
            for name in output.get_names() & (wanted - names.keys())
            if not is_quantized or _after_quantization(output) is not output
        }
        for name, output in found.items():
            names[name] = len(model.outputs)
            model.add_outputs(output)
        compiled = core.compile_model(
            model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        )
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot open {path}: {first_line(error)}") from error
    return compiled, names


def _after_quantization(output: Any) -> Any:
    """The FakeQuantize of `output`, if that is all that reads it; else `output` itself."""
    readers = [target.get_node() for target in output.get_target_inputs()]
    if len(readers) == 1 and readers[0].get_type_name() == "FakeQuantize":
        return readers[0].output(0)
    return output
