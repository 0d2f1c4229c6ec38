"""What a rounded network's file is worth beside the float32 network, on images that nothing was calibrated on."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cveff.compress.quant.error import relative_error
from cveff.data.dataset import Split
from cveff.errors import EngineError
from cveff.export.deploy_checks import FEW_IMAGES
from cveff.export.scoring import score
from cveff.measure.predictor import Predictor, torch_predictor
from cveff.model import Model
from cveff.progress import Progress
from cveff.runtime.engines import open_file
from cveff.runtime.errors import first_line
from cveff.runtime.machine import isa, saturates

KERNEL_GAP = 0.02
"""A share of images on which the engine answers otherwise than the file says that is worth a warning."""


@dataclass(frozen=True)
class Figures:
    """A rounded network beside the float32 one.

    Attributes:
        split, count: the images.
        engine: what computed the file, "onnxruntime"; "torch" where ONNX Runtime does not open it.
        accuracy, float_accuracy: shares that are right, in [0, 1]; None without labels.
        agreement: share of images with float32's answer.
        error: energy of the change of the logits over that of their differences between classes.
        simulated: share of images on which the file answers as the network in PyTorch does; None where there was no
            engine for it.
    """

    split: str
    count: int
    engine: str
    accuracy: float | None
    float_accuracy: float | None
    agreement: float
    error: float
    simulated: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def measure(
    model: Model, rounded: Model, file: Path, split: Split, progress: Progress
) -> tuple[Figures, list[str]]:
    """Let the float32 network, the rounded one and its file answer the same images.

    Returns:
        the figures, and warnings.

    Raises:
        EngineError: one of the networks cannot be run.
    """
    warnings = []
    with ExitStack() as stack:
        predictors: dict[str, Predictor] = {
            "float": torch_predictor(model),
            "rounded": torch_predictor(rounded),
        }
        try:
            predictors["file"] = stack.enter_context(open_file("onnxruntime", file, threads=0))
        except EngineError as error:
            reason = first_line(error).replace(str(file), file.name)
            warnings.append(f"{reason}; so PyTorch's figures are given")
        scores = score(predictors, split, model.spec.input, progress, f"scoring on {split.name}")
    for name in ("float", "rounded"):
        if name in scores.errors:
            raise EngineError(f"the {name} network {scores.errors[name]}")
    if "file" in scores.errors:
        warnings.append(f"ONNX Runtime {scores.errors['file']}; so PyTorch's figures are given")
    best = "file" if "file" in scores.logits else "rounded"
    simulated = scores.agreement("file", "rounded") if best == "file" else None
    if simulated is not None and simulated < 1 - KERNEL_GAP:
        why = (
            "integer kernels without VNNI clip sums; quantize with saturation=narrow, or use OpenVINO"
            if saturates(isa())
            else "compare with its answers without graph optimisations, or use OpenVINO"
        )
        warnings.append(
            f"ONNX Runtime answers otherwise than the file says on {1 - simulated:.1%} of the images: {why}"
        )
    if len(split) < FEW_IMAGES:
        warnings.append(
            f"Only {len(split)} images were measured: one image is {100 / len(split):.1f} points."
        )
    logits = {name: torch.from_numpy(values) for name, values in scores.logits.items()}
    figures = Figures(
        split=split.name,
        count=len(split),
        engine="onnxruntime" if best == "file" else "torch",
        accuracy=scores.accuracy(best),
        float_accuracy=scores.accuracy("float"),
        agreement=scores.agreement(best, "float"),
        error=relative_error(logits[best], logits["float"]),
        simulated=simulated,
    )
    return figures, warnings
