"""What a model's file returns, by task, and the proof that it does: names of the outputs, suppression, masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import nn

from cveff.errors import ExportError
from cveff.measure.detections import agreement
from cveff.measure.parity import relative_difference
from cveff.model import Model
from cveff.runtime.detections import suppress, unpad
from cveff.target import Target
from cveff.tasks.segmenter import Mask
from cveff.tasks.suppress import Suppressed

Nms = Literal["onnx", "none"]
Output = Literal["logits", "labels"]
Arrays = Mapping[str, np.ndarray]

DETECTION_TOLERANCE = 1e-3
"""Sizes of boxes are exponentials of what many layers add up, and errors grow with them."""
MIN_AGREEMENT = 0.99
"""Share of detections, or of pixels, that the file must have as the rule gives them for its own boxes or logits."""


@dataclass(frozen=True)
class Answer:
    """What a file returns.

    Attributes:
        network: the model's network, returning `names` and then `proofs`.
        names: the file's outputs.
        proofs: outputs that are compared with PyTorch and then taken out: what the others were made from.
        tolerance: relative difference from PyTorch that is allowed at least.
        has_choices: the proofs are choices of the network's, which PyTorch is shown before `names` are compared.
    """

    network: nn.Module
    names: tuple[str, ...]
    proofs: tuple[str, ...] = ()
    tolerance: float = 0.0
    has_choices: bool = False

    @property
    def compared(self) -> tuple[str, ...]:
        """Outputs that PyTorch has, too, up to rounding; a mask or a detection may go either way."""
        return self.names if self.has_choices else self.proofs or self.names


def answer(model: Model, nms: Nms | None = None, output: Output | None = None) -> Answer:
    """What the file of `model` returns.

    Args:
        nms: of a detector: "onnx" suppresses in the graph, "none" returns every box; by default "onnx".
        output: of a segmentation network: "logits" or "labels"; by default "logits".

    Raises:
        ExportError: an option of another task, or an unknown value.
    """
    task = model.spec.task
    for name, value, of, known in (
        ("nms", nms, "detection", ("onnx", "none")),
        ("output", output, "segmentation", ("logits", "labels")),
    ):
        if value is not None and task != of:
            raise ExportError(
                f"{name} is for {of}; {model.spec.architecture} is a {task} model: leave it out"
            )
        if value is not None and value not in known:
            raise ExportError(f"{name} is {value!r}; use one of {', '.join(known)}")
    network: Any = model.module
    if task == "detection" and nms != "none":
        suppressed = Suppressed(network, network.suppression)
        return Answer(
            suppressed, ("boxes", "scores", "labels"), ("all_boxes", "all_scores"), DETECTION_TOLERANCE
        )
    if task == "detection":
        return Answer(network, ("boxes", "scores"), tolerance=DETECTION_TOLERANCE)
    if output == "labels":
        return Answer(Mask(network), ("labels",), ("logits",))
    return Answer(network, ("logits",))


def nms_for(target: Target) -> Nms:
    """Where a target's files suppress: in the graph, but outside for TensorRT, whose plans want fixed shapes."""
    return "none" if any(engine == "tensorrt" for engine, _ in target.candidates) else "onnx"


def describe(model: Model) -> dict[str, Any]:
    """What the file's metadata says about its outputs besides the task; nothing for classification."""
    if model.spec.task == "detection":
        network: Any = model.module
        return {"suppression": network.suppression.to_json()}
    return {}


def translations() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`."""
    from onnxscript import opset20 as op

    def suppress_onnx(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float) -> Any:
        selected = op.NonMaxSuppression(
            boxes,
            scores,
            op.Constant(value_ints=[int(boxes.shape[1])]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[score_threshold]),
        )  # (kept, 3): image, row of scores, box
        nothing = op.Mul(scores, op.Constant(value_float=0.0))
        return op.ScatterND(nothing, selected, op.GatherND(scores, selected))

    return {torch.ops.cveff.suppress.default: suppress_onnx}


def drop_proofs(proto: onnx.ModelProto, shipped: Answer) -> None:
    """Take the outputs that only the comparison needs out of the graph, in place."""
    for item in [item for item in proto.graph.output if item.name in shipped.proofs]:
        proto.graph.output.remove(item)


def require_rule(found: Arrays, proofs: Arrays, model: Model) -> None:
    """Check what was made of boxes or logits against the same rule in numpy, on the file's own values.

    Args:
        found: outputs of the file as it ships.
        proofs: the outputs that were taken out of it.

    Raises:
        ExportError: fewer than `MIN_AGREEMENT` detections or pixels are the same.
    """
    network: Any = model.module
    if model.spec.task == "detection":
        rows = zip(found["boxes"], found["scores"], found["labels"], strict=True)
        ours = [unpad(*row) for row in rows]
        pairs = zip(proofs["all_boxes"], proofs["all_scores"], strict=True)
        theirs = [suppress(boxes, scores, network.suppression) for boxes, scores in pairs]
        share, what = agreement(ours, theirs).share, "detections"
    else:
        share = float((found["labels"] == proofs["logits"].argmax(1)).mean())
        what = "pixels"
    if share < MIN_AGREEMENT:
        raise ExportError(
            f"{model.spec.architecture}: only {share:.2%} of the ONNX file's {what} are what its own "
            f"{' and '.join(proofs)} give; no file was written"
        )


def worst_difference(found: Arrays, expected: Arrays, names: tuple[str, ...], name: str) -> float:
    """The largest relative difference of any of the outputs `names`; errors call the model `name`.

    Raises:
        ExportError: an output has another shape.
    """
    for key in names:
        if found[key].shape != expected[key].shape:
            raise ExportError(
                f"{name}: the file returns {key} of shape {found[key].shape} for a batch of {len(expected[key])}, "
                f"PyTorch {expected[key].shape}; the network fixes its batch size somewhere"
            )
    return max(relative_difference(found[key], expected[key]) for key in names)
