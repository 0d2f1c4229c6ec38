"""What was rounded and what it costs, layer by layer, as plain values for a manifest or a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cveff.compress.quant.layers import find_layers
from cveff.compress.quant.mixed import Mixed
from cveff.compress.quant.post_training import Quantized
from cveff.compress.quant.sensitivity import Cost, rounding_costs


def describe(
    found: Quantized, batches: Sequence[Tensor], *, mixed: Mixed | None = None, seed: int = 0
) -> dict[str, Any]:
    """Everything a reader may ask of a rounded network.

    Args:
        batches: images (B, C, H, W), normalised, that costs are measured on; a few dozen.
        mixed: why segments are in floats, where a search decided it.
        seed: of the answers drawn (`rounding_costs`).

    Returns:
        `method`, `images`, `error`, `equalized` as `Quantized` has them; `layers`: `name`, `precision` ("int8" or
        "fp32"), `why` (of floats), `decibels` (signal to noise of the output, its weight alone rounded), `nats` (what
        that costs), `narrowed` (channels with wider steps); `tensors`: `name`, `low`, `high` (the range that is kept),
        `seen` (least and greatest value on the calibration images), `decibels`, `nats`.
    """
    costs = rounding_costs(found.exact, found.graph, found.roundings, batches, seed=seed)
    reasons = {
        layer: f"{part.name} {part.why}"
        for part in (mixed.parts if mixed is not None else ())
        if part.why
        for layer in part.layers
    }
    rounded = found.roundings.weights
    layers = []
    for layer in find_layers(found.exact):
        is_rounded = layer.name in rounded
        layers.append(
            {
                "name": layer.name,
                "precision": "int8" if is_rounded else "fp32",
                "why": "" if is_rounded else reasons.get(layer.name, _why_float(layer.name, found)),
                **_cost(costs.weights.get(layer.name)),
                "narrowed": found.narrowed.get(layer.name, 0),
            }
        )
    tensors = []
    for name, rounding in found.roundings.tensors.items():
        scale, zero = float(rounding.scale), float(rounding.zero_point.round())
        tensors.append(
            {
                "name": name,
                "low": (rounding.grid.low - zero) * scale,
                "high": (rounding.grid.high - zero) * scale,
                "seen": list(found.extremes[name]) if name in found.extremes else None,
                **_cost(costs.tensors.get(name)),
            }
        )
    return {
        "scheme": found.placement.scheme,
        "method": found.method,
        "images": found.seen.images,
        "error": found.error,
        "equalized": found.equalized,
        "layers": layers,
        "tensors": tensors,
    }


def _why_float(name: str, found: Quantized) -> str:
    if name in found.placement.excluded:
        return "was to stay in floats"
    return "the engine gains nothing by rounding it"


def _cost(cost: Cost | None) -> dict[str, float | None]:
    if cost is None:
        return {"decibels": None, "nats": None}
    return {"decibels": cost.decibels if math.isfinite(cost.decibels) else None, "nats": cost.nats}
