"""Operators whose values float16 cannot hold, found by running calibration images through the float32 network.

float16 ends at 65504, and loses precision below 2^-14 and everything below 2^-25. bfloat16 has float32's range: only
NaN and infinity are looked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cveff.compress.quant.capture import constant, identify
from cveff.compress.quant.checks import check_parameters
from cveff.compress.quant.half_rules import data_inputs, is_float, kind_of
from cveff.errors import StepError

LARGEST = float(torch.finfo(torch.float16).max)
SMALLEST_NORMAL = 2.0**-14
MARGIN = 4.0
"""Other images may take a tensor this many times further than calibration images did."""
MOST_SMALL = 0.5
"""A tensor of which a larger share lies below `SMALLEST_NORMAL` is kept in float32. The share is of the sum of
magnitudes: nearly all of a sharp softmax's values are tiny, and none of them matters."""


@dataclass(frozen=True)
class Kept:
    """An operator that stays in float32 for what it computes with.

    Attributes:
        operator: as `identify` names it.
        reason: the tensor, its range and why float16 does not do.
        reach: the largest magnitude seen.
    """

    operator: str
    reason: str
    reach: float


@dataclass
class _Seen:
    reach: float = 0.0
    total: float = 0.0
    small: float = 0.0

    def add(self, values: Tensor) -> None:
        sizes = values.detach().abs()
        self.reach = max(self.reach, float(sizes.max()) if sizes.numel() else 0.0)
        self.total += float(sizes.sum(dtype=torch.float64))
        self.small += float(torch.where(sizes < SMALLEST_NORMAL, sizes, 0).sum(dtype=torch.float64))

    def problem(self, limit: float) -> str:
        if self.reach > limit:
            return f"reaches {self.reach:.3g}, more than {limit:.3g}"
        if self.total > 0 and self.small > MOST_SMALL * self.total:
            share = 100 * self.small / self.total
            return (
                f"lies to {share:.0f}% below float16's normal numbers, 6.1e-05 (it reaches {self.reach:.2g})"
            )
        return ""


class _Measure(fx.Interpreter):
    """Runs a graph and remembers the magnitudes of every operator's result."""

    def __init__(self, graph: fx.GraphModule, names: dict[fx.Node, str]) -> None:
        super().__init__(graph)
        self.names = names
        self.seen: dict[fx.Node, _Seen] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.names and isinstance(result, Tensor) and result.is_floating_point():
            seen = self.seen.setdefault(n, _Seen())
            seen.add(result)
            if not seen.reach < float("inf"):
                raise StepError(
                    f"{self.names[n]} computes NaN or infinity on calibration images in float32; "
                    "check the images' normalisation and the weights"
                )
        return result


@torch.no_grad()
def out_of_range(graph: fx.GraphModule, batches: Iterable[Tensor], *, half: bool = True) -> list[Kept]:
    """Every operator that could compute in 16 bits, and whose inputs, result or weights float16 does not hold.

    Args:
        graph: captured and tidied, float32.
        batches: images (B, C, H, W), normalised.
        half: for float16; bfloat16 holds everything finite.

    Raises:
        StepError: no images, or a value (named) is NaN or infinite.
    """
    check_parameters(graph)
    names = {node: name for name, node in identify(graph).items()}
    measure = _Measure(graph, names)
    count = 0
    for images in batches:
        measure.run(images)
        count += len(images)
    if count == 0:
        raise StepError("there are no calibration images; give at least one, better 100")
    if not half:
        return []
    found = []
    for node, name in names.items():
        if name == "input" or not is_float(node) or kind_of(node) == "float":
            continue
        inputs = sorted(data_inputs(node), key=lambda tensor: tensor.op != "get_attr")
        for tensor in [*inputs, node]:
            what, problem = _problem(graph, measure, tensor, node)
            if problem:
                reach = measure.seen[tensor].reach if tensor in measure.seen else 0.0
                found.append(Kept(name, f"{what} {problem}", reach))
                break
    return found


def _problem(graph: fx.GraphModule, measure: _Measure, tensor: fx.Node, reader: fx.Node) -> tuple[str, str]:
    weight = constant(graph, tensor)
    if weight is not None:
        seen = _Seen()
        seen.add(weight)
        return f"its parameter {tensor.target}", seen.problem(LARGEST)
    what = "its result" if tensor is reader else f"its input {measure.names.get(tensor, tensor.name)}"
    return what, measure.seen[tensor].problem(LARGEST / MARGIN) if tensor in measure.seen else ""
