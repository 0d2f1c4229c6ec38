"""Does the engine answer what an int8 file says? On CPUs without VNNI, ONNX Runtime's integer kernels saturate.

With graph optimisations off every quantize and dequantize is computed as written, in float32: what the file means.
A candidate whose answers differ from that loses accuracy to the kernel and not to the quantization, and the same
file answers otherwise on another CPU. Nobody sees it who does not compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cveff.export.candidates import Candidate, finite
from cveff.measure.accuracy import agreement
from cveff.measure.meaning import meaning_gap
from cveff.measure.parity import cosine, largest_rise, relative_difference
from cveff.runtime.engines import open_file

LARGE_SHARE, LARGE_COSINE = 0.02, 0.995
"""A gap is large when more than this share of the answers differ and the logits point elsewhere by this much."""
_CHUNK, _LAYER_IMAGES = 8, 8


def num_gap_images(size: tuple[int, int]) -> int:
    """How many images to compare on: computing a file as written is many times slower than running it."""
    return 256 if size[0] * size[1] <= 96 * 96 else 64


def has_kernels(candidate: Candidate) -> bool:
    """Whether the candidate is one whose integer kernels may answer otherwise than its file."""
    return (
        not candidate.error and candidate.engine == "onnxruntime" and candidate.precision.startswith("int8")
    )


def with_kernel_gap(candidate: Candidate, images: np.ndarray, logits: np.ndarray) -> Candidate:
    """`candidate` with `meaning_gap` filled in.

    Args:
        images: (N, H, W, C) uint8. logits: (N, classes), the engine's answers to them.
    """
    assert candidate.path is not None
    options = {"graph_optimizations": False}
    with open_file("onnxruntime", candidate.path, threads=candidate.threads, options=options) as as_written:
        meant = np.concatenate(
            [as_written(images[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK)]
        )
    share, angle = agreement(logits, meant), cosine(logits, meant)
    is_large = share < 1 - LARGE_SHARE and angle < LARGE_COSINE
    layer = None
    if is_large:
        layers = meaning_gap(candidate.path, images[:_LAYER_IMAGES], threads=candidate.threads).layers
        worst = largest_rise(layers)
        layer = None if worst is None else worst.module or worst.name
    values = {
        "agreement": share,
        "relative_difference": finite(relative_difference(logits, meant)),
        "cosine": angle,
        "images": len(images),
        "large": is_large,
        "layer": layer,
    }
    return replace(candidate, meaning_gap=values)


def gap_warnings(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """A sentence for each candidate with a large gap."""
    warnings = []
    for candidate in candidates:
        gap = candidate.meaning_gap
        if gap is not None and gap["large"]:
            where = f", most of it from {gap['layer']} on" if gap["layer"] else ""
            warnings.append(
                f"{candidate.name}: this CPU's engine answers otherwise than the file says on "
                f"{100 * (1 - gap['agreement']):.1f}% of {gap['images']} images{where}. Its integer kernels "
                "saturate; on a CPU with other instructions the same file answers otherwise."
            )
    return tuple(warnings)
