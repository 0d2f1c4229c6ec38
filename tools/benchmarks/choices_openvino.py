"""Sections of choices.py on OpenVINO: zero points, fixed batch sizes, SmoothQuant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from workshop import THREADS, Opener, Workshop, centred_cosine, run_all, variation_error

from cveff.export.openvino import quantize_openvino
from cveff.measure.parity import relative_difference
from cveff.runtime.engines import open_file

SYMMETRIC, ASYMMETRIC = "performance (symmetric)", "mixed (asymmetric)"


def presets(workshop: Workshop) -> dict[str, Any]:
    """NNCF's two presets on networks whose activation functions have a negative side."""
    found: dict[str, Any] = {"models": {}}
    for name in workshop.some(("fastvit_t8", "mobilenetv3_small_100")):
        openers = {"f32": opener(workshop.openvino(name))}
        for label, preset in ((SYMMETRIC, "performance"), (ASYMMETRIC, "mixed")):
            path = workshop.folder / f"{name}.{preset}.xml"
            openers[label] = opener(
                quantize_openvino(
                    workshop.exported(name), path, workshop.calibration(name), preset=preset, smooth=False
                )
            )
        held_out = workshop.held_out(name)
        logits = {label: run_all(call(), held_out) for label, call in openers.items()}
        found["models"][name] = {
            "cosine": {label: centred_cosine(values, logits["f32"]) for label, values in logits.items()},
            "by_batch": {
                str(batch): workshop.times(openers, held_out[:batch], reference=SYMMETRIC)
                for batch in workshop.batches
            },
        }
    return found


def static_batch(workshop: Workshop) -> dict[str, Any]:
    """A network compiled for the batch it gets, as cveff's runtime does, against one open to any batch.

    Times are float32's; "int8_relative_difference" is how far the logits of the two are apart in int8, batch 1.
    """
    found: dict[str, Any] = {"models": {}}
    for name in workshop.some(("mobilenetv4_conv_small", "convnext_atto", "vit_tiny_patch16_224")):
        path, held_out = workshop.openvino(name), workshop.held_out(name)
        openers: dict[str, Opener] = {
            "fixed": opener(path),
            "open": lambda path=path: dynamic_openvino(path),
        }
        int8 = quantize_openvino(
            workshop.exported(name),
            workshop.folder / f"{name}.batch.xml",
            workshop.calibration(name),
            smooth=False,
        )
        logits = [run_all(call, held_out) for call in (dynamic_openvino(int8), opener(int8)())]
        found["models"][name] = {
            "int8_relative_difference": relative_difference(*logits),
            "by_batch": {
                str(batch): workshop.times(openers, held_out[:batch], reference="fixed")
                for batch in workshop.batches
            },
        }
    return found


def smoothing(workshop: Workshop) -> dict[str, Any]:
    """SmoothQuant on and off: error of the logits relative to their variation, and times."""
    found: dict[str, Any] = {"models": {}}
    for name in workshop.some(("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")):
        held_out = workshop.held_out(name)
        expected = run_all(opener(workshop.openvino(name))(), held_out)
        openers = {}
        for label, smooth in (("smoothed", True), ("not smoothed", False)):
            path = workshop.folder / f"{name}.smooth-{smooth}.xml"
            openers[label] = opener(
                quantize_openvino(workshop.exported(name), path, workshop.calibration(name), smooth=smooth)
            )
        found["models"][name] = {
            "error": {
                label: variation_error(run_all(call(), held_out), expected) for label, call in openers.items()
            },
            "by_batch": {"1": workshop.times(openers, held_out[:1], reference="smoothed")},
        }
    return found


def opener(path: Path) -> Opener:
    """The file as cveff's runtime runs it."""
    return lambda: open_file("openvino", path, threads=THREADS)


def dynamic_openvino(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The file with the runtime's settings, compiled once for any batch size."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": THREADS,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(str(path)), "CPU", settings).create_infer_request()

    def call(images: np.ndarray) -> np.ndarray:
        request.infer([images], share_inputs=True)
        return np.array(request.get_output_tensor(0).data, np.float32)

    return call
