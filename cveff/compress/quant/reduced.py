"""What `Quantize` does for "fp16", "bf16" and "fp8": convert, and say which operators are not converted, and why."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from torch import Tensor

from cveff.compress.quant.float8 import to_float8
from cveff.compress.quant.half import Half, to_half
from cveff.compress.quant.half_rest import halve_rest
from cveff.compress.quant.network import QuantizedGraph, is_cast
from cveff.model import Model, with_module
from cveff.progress import Progress, Silent

FloatPrecision = Literal["fp16", "bf16", "fp8"]


def reduce_floats(
    model: Model,
    precision: FloatPrecision,
    batches: Sequence[Tensor],
    exclude: Collection[str] = (),
    progress: Progress | None = None,
) -> Model:
    """`model` in fewer bits; it is left as it is.

    Args:
        batches: images (B, C, H, W), normalised.
        exclude: operators that stay in float32, by the names in the messages.
        progress: gets one line on the result, and one for each operator that stays in float32 for its values.

    Raises:
        StepError: see `to_half` and `to_float8`.
    """
    progress = progress or Silent()
    spec = model.spec.input
    if precision == "fp8":
        graph, placement = to_float8(model.module, spec, batches, exclude)
        progress.message(
            f"fp8: {len(placement.weights)} layers and {len(placement.sites)} tensors are rounded"
        )
        return with_module(model, graph, QuantizedGraph.of(spec, placement))
    return _told(model, precision, to_half(model.module, spec, batches, precision, exclude), progress)


def is_for_tensorrt(model: Model) -> bool:
    """Whether a model is rounded to 8 bits by the "tensorrt" scheme, and in float32 where it is not."""
    schemes = (getattr(edit, "scheme", "") for edit in model.spec.edits)
    return "tensorrt" in schemes and not is_cast(model.module)


def reduce_rest(
    model: Model,
    batches: Sequence[Tensor],
    exclude: Collection[str] = (),
    progress: Progress | None = None,
) -> Model:
    """`model`, of which `is_for_tensorrt` holds, with its floats in float16; arguments as of `reduce_floats`.

    Raises:
        StepError: see `halve_rest`.
    """
    found = halve_rest(model.module, model.spec.input, batches, exclude)
    return _told(model, "the rest in fp16", found, progress or Silent())


def _told(model: Model, what: str, found: Half, progress: Progress) -> Model:
    progress.message(
        f"{what}: {found.num_half} operators in 16 bits, {found.num_float} in float32, {found.casts} conversions"
    )
    for kept in found.kept:
        progress.message(f"{kept.operator} stays in float32: {kept.reason}")
    return with_module(model, found.graph, found.edit)
