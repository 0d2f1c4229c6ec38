"""Parity layer by layer between two ONNX files of the same network, for instance float32 and int8 Q/DQ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cveff.errors import CveffError
from cveff.measure._onnx_graph import Exposed, Graph, Quantized
from cveff.measure.parity import Comparison, LayerParity
from cveff.measure.threads import usable_cores

Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]

CHUNK = 4
"""Images run at a time: every activation of the chunk is in memory at once."""


@dataclass(frozen=True)
class Twin:
    """Where an activation is found in another graph: a float tensor, or the integers it is stored as."""

    tensor: str
    quantized: Quantized | None = None

    def read(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Its float value, from a run's tensors."""
        value = values[self.tensor]
        return value if self.quantized is None else self.quantized.dequantize(value)


def layer_parity(
    reference_onnx: str | Path,
    other: str | Path,
    images: np.ndarray,
    *,
    graph_optimizations: bool = False,
    threads: int | None = None,
) -> list[LayerParity]:
    """Compare every activation that both graphs compute, in the order of the reference.

    A quantized activation is read as the integers behind its QuantizeLinear and restored, so its own rounding
    counts. A ReLU that the quantizer folded into a zero point is matched with the integers that replace it.

    Args:
        reference_onnx, other: files; activations are matched by tensor name, which quantizers keep.
        images: uint8 (N, H, W, C); four are run at a time.
        graph_optimizations: False runs `other` as written, every activation visible. True runs it as shipped,
            with the engine's integer kernels; then only stored integers and the outputs are compared, since
            reading a float tensor inside a fused operator would undo the fusion.
        threads: of the engine; by default every core.

    Raises:
        EngineError: a file cannot be opened or run.
        CveffError: the graphs have no activation in common, or shapes differ.
    """
    reference_graph, other_graph = Graph(reference_onnx), Graph(other)
    twins = match(reference_graph, other_graph)
    if graph_optimizations:
        visible = {*other_graph.watchable(), *other_graph.outputs}
        twins = {name: twin for name, twin in twins.items() if twin.tensor in visible}
    if not twins:
        raise CveffError(
            f"{reference_onnx} and {other} have no tensor name in common; compare files made from one export"
        )
    threads = threads or usable_cores()
    expected = Exposed(reference_graph, twins, graph_optimizations=False, threads=threads)
    found = Exposed(
        other_graph,
        [twin.tensor for twin in twins.values()],
        graph_optimizations=graph_optimizations,
        threads=threads,
    )
    there = set(found.available)
    twins = {
        name: twin for name, twin in twins.items() if name in expected.available and twin.tensor in there
    }
    return compare_runs(
        reference_graph,
        list(twins),
        lambda chunk: expected.run(chunk, list(twins)),
        lambda chunk: read(found, twins, chunk),
        images,
    )


def compare_runs(
    graph: Graph, names: Sequence[str], reference: Run, other: Run, images: np.ndarray
) -> list[LayerParity]:
    """Run both over `images` in chunks of `CHUNK` and compare tensor by tensor.

    Args:
        graph: says the operator and the module of each tensor, and the order.
        names: the activations to compare.
        reference, other: uint8 (n, H, W, C) -> name -> value, for every one of `names`.
    """
    if not len(images):
        raise CveffError("there are no images to compare on; give at least one")
    comparisons = {name: Comparison() for name in graph.activations if name in set(names)}
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        expected, found = reference(chunk), other(chunk)
        for name, comparison in comparisons.items():
            comparison.add(found[name], expected[name])
    return [
        LayerParity(
            name=name,
            op=graph.activations[name],
            relative_difference=comparison.relative_difference,
            cosine=comparison.cosine,
            module=graph.modules.get(name, ""),
        )
        for name, comparison in comparisons.items()
    ]


def read(session: Exposed, twins: Mapping[str, Twin], images: np.ndarray) -> dict[str, np.ndarray]:
    """Run `session` and return, for every key of `twins`, its twin's float value."""
    values = session.run(images, list(dict.fromkeys(twin.tensor for twin in twins.values())))
    return {name: twin.read(values) for name, twin in twins.items()}


def match(reference: Graph, other: Graph) -> dict[str, Twin]:
    """Activation of `reference`, in order -> the tensor of `other` that stands for it, where there is one."""
    twins: dict[str, Twin] = {}
    for name in reference.activations:
        if name in other.quantized:
            twins[name] = Twin(other.quantized[name].tensor, other.quantized[name])
        elif name in other.activations:
            twins[name] = Twin(name)
    for name in reference.activations:
        absorbed = _absorbed_activation(reference, other, name)
        if absorbed is not None:
            # The integers clip at the zero point: they are the ReLU's output, not its input.
            twins[absorbed] = twins.pop(name)
    return twins


def _absorbed_activation(reference: Graph, other: Graph, name: str) -> str | None:
    """Name of the ReLU or Clip of `name` that `other` expresses by quantizing `name` itself, if it does."""
    if name not in other.quantized:
        return None
    consumers = reference.consumers.get(name, [])
    if len(consumers) != 1 or consumers[0].op_type not in ("Relu", "Clip"):
        return None
    output = consumers[0].output[0]
    return None if output in other.activations or output in other.quantized else str(output)
