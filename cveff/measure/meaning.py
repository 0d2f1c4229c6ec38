"""Meaning versus engine: the same int8 file computed as written, and as the engine computes it.

With graph optimisations off, ONNX Runtime evaluates every QuantizeLinear and DequantizeLinear as written and
convolves in float32: that is what the file means. With them on, integer kernels run. On CPUs without VNNI
those add pairs of 8-bit products in 16 saturating bits, and a fair file can give ruined answers. Only
comparing the two tells a bad quantization from a bad kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cveff.measure._onnx_graph import Exposed, Graph
from cveff.measure.accuracy import agreement
from cveff.measure.onnx_parity import CHUNK, Twin, compare_runs, read
from cveff.measure.parity import Comparison, LayerParity
from cveff.measure.threads import usable_cores


@dataclass(frozen=True)
class MeaningGap:
    """How far the engine's answers are from what the file says.

    Attributes:
        agreement: share of images with the same top-1 class, in [0, 1].
        relative_difference, cosine: of the logits, the file as written being the reference.
        layers: the same for every activation that the file stores as integers and that can be watched, in
            order; empty for a float file.
        layers_are_exact: whether reading those layers left the engine's logits bit for bit as they were.
            If not, the engine fused less while being watched, and the layers only indicate.
    """

    agreement: float
    relative_difference: float
    cosine: float
    num_images: int
    layers: tuple[LayerParity, ...]
    layers_are_exact: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "layers": [layer.to_json() for layer in self.layers]}


def meaning_gap(file: str | Path, images: np.ndarray, *, threads: int | None = None) -> MeaningGap:
    """Run an ONNX file with graph optimisations off and on, and compare.

    Args:
        images: uint8 (N, H, W, C).
        threads: of the engine; by default every core.

    Raises:
        EngineError: ONNX Runtime cannot open or run the file.
    """
    threads = threads or usable_cores()
    graph = Graph(file)
    output = graph.outputs[0]
    watchable = graph.watchable()
    twins = {
        name: Twin(twin.tensor, twin) for name, twin in graph.quantized.items() if twin.tensor in watchable
    }
    stored = [twin.tensor for twin in twins.values()]
    as_written = Exposed(graph, stored, graph_optimizations=False, threads=threads)
    shipped = Exposed(graph, (), graph_optimizations=True, threads=threads)
    meant, given = _logits(as_written, images, output), _logits(shipped, images, output)
    comparison = Comparison()
    comparison.add(given, meant)
    layers: list[LayerParity] = []
    exact = True
    if stored:
        watched = Exposed(graph, stored, graph_optimizations=True, threads=threads)
        exact = bool(np.array_equal(_logits(watched, images, output), given, equal_nan=True))
        layers = compare_runs(
            graph,
            list(twins),
            lambda chunk: read(as_written, twins, chunk),
            lambda chunk: read(watched, twins, chunk),
            images,
        )
    return MeaningGap(
        agreement=agreement(given, meant),
        relative_difference=comparison.relative_difference,
        cosine=comparison.cosine,
        num_images=len(images),
        layers=tuple(layers),
        layers_are_exact=exact,
    )


def _logits(session: Exposed, images: np.ndarray, output: str) -> np.ndarray:
    return np.concatenate(
        [
            session.run(images[start : start + CHUNK], [output])[output]
            for start in range(0, len(images), CHUNK)
        ]
    )
