"""What each layer could become: ranks with their measured milliseconds and the error that they leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from cveff.compress import low_rank_math
from cveff.compress.low_rank_calibration import LayerStatistics
from cveff.compress.low_rank_edit import METHODS, Factor, geometry, largest_rank
from cveff.target import CHANNEL_MULTIPLE

_GROWTH = {"svd": 1.1, "spatial-vertical": 1.25, "spatial-horizontal": 1.25, "tucker": 1.4}
"""A rank is tried where it is this much above the last one; an SVD gives the errors of all ranks at once."""

Stage = tuple[Factor, tuple[int, ...]]
"""A factor and the shape of what reaches it, batch of 1."""
Cost = Callable[[Sequence[Stage]], Sequence[float] | np.ndarray]
"""Milliseconds of each stage, measured."""


@dataclass(frozen=True)
class Option:
    """One chain that could stand in for a layer.

    Attributes:
        milliseconds: of the whole chain, batch of 1.
        error: relative output error on the calibration images (of the weights, where there are none), in [0, 1].
        loss: what the choice adds up: the error weighted by the layer's sensitivity.
        factors: kernels (out, in, height, width) float32, first applied first.
        bias: (out,) float32.
    """

    method: str
    rank: tuple[int, ...]
    milliseconds: float
    error: float
    loss: float
    factors: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    bias: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class LayerOptions:
    """A layer as it is, and the chains worth having: each is faster than all with less error.

    Attributes:
        options: fastest first; empty where `reason` says why.
    """

    milliseconds: float
    options: tuple[Option, ...]
    reason: str = ""


def layer_options(
    layer: nn.Module,
    shape: tuple[int, ...],
    cost: Cost,
    *,
    statistics: LayerStatistics | None = None,
    sensitivity: float = 1.0,
    methods: Sequence[str] = METHODS,
    min_gain: float = 0.05,
    max_error: float | None = None,
    damping: float = low_rank_math.DAMPING,
    step: int = CHANNEL_MULTIPLE,
) -> LayerOptions:
    """Every method and rank for one layer, without those that lose to another in both time and error.

    Args:
        shape: of the layer's input, batch of 1.
        statistics: of its inputs; None makes the factors from the weights alone.
        sensitivity: what an error of the whole output would cost.
        min_gain: share of the layer's time that an option must save.
        max_error: largest relative output error of an option.
        step: ranks are multiples of this.
    """
    weight = cast(Tensor, layer.weight).detach()
    weight = weight.double().reshape(*weight.shape, *[1] * (4 - weight.ndim))
    dense = chain(geometry(layer), shape)
    tried = [
        (method, rank)
        for method in methods
        for rank in candidate_ranks(layer, method, step)
        if macs(chain(geometry(layer, method, rank), shape)) < (1 - min_gain) * macs(dense)
    ]
    if not tried:
        return LayerOptions(float(sum(cost(dense))), (), "is so small that no rank would save operations")
    stages = [chain(geometry(layer, method, rank), shape) for method, rank in tried]
    times = iter(cost([*dense, *(stage for chain in stages for stage in chain)]))
    now = float(next(times))
    spent = [sum(float(next(times)) for _ in stage) for stage in stages]
    fast = [index for index, time in enumerate(spent) if time <= (1 - min_gain) * now]
    if not fast:
        reason = (
            f"would not get {min_gain:.0%} faster: the best rank takes {min(spent):.3f} ms, not {now:.3f}"
        )
        return LayerOptions(now, (), reason)
    found = []
    for method in dict.fromkeys(tried[index][0] for index in fast):
        ranks = {tried[index][1]: spent[index] for index in fast if tried[index][0] == method}
        for rank, make, error in _factorised(weight, method, list(ranks), statistics, damping):
            found.append((Option(method, rank, ranks[rank], error, sensitivity * error), make))
    smallest = min(option.error for option, _ in found)
    if max_error is not None:
        found = [(option, make) for option, make in found if option.error <= max_error]
    if not found:
        return LayerOptions(
            now,
            (),
            f"loses at least {smallest:.1%} of its output at a rank that is faster ({max_error:.1%} allowed)",
        )
    kept: list[Option] = []
    bias = cast("Tensor | None", layer.bias)
    for option, make in sorted(found, key=lambda item: (item[0].milliseconds, item[0].error)):
        if kept and option.error >= kept[-1].error:
            continue
        kernels = make()
        mean = None if statistics is None else statistics.mean
        corrected = low_rank_math.corrected_bias(weight, low_rank_math.compose(kernels), bias, mean)
        factors = tuple(kernel.float() for kernel in kernels)
        kept.append(replace(option, factors=factors, bias=corrected.float()))
    return LayerOptions(now, tuple(kept))


def _factorised(
    weight: Tensor,
    method: str,
    ranks: Sequence[tuple[int, ...]],
    statistics: LayerStatistics | None,
    damping: float,
) -> Iterator[tuple[tuple[int, ...], Callable[[], tuple[Tensor, ...]], float]]:
    """(rank, how to make its factors, relative error) for every rank, from one decomposition where one is enough."""
    covariance = None if statistics is None else statistics.covariance
    if method == "svd":
        matrix = weight.flatten(1)
        basis = low_rank_math.output_basis(matrix, covariance, damping)
        energy = low_rank_math.dropped_energy(matrix, basis, covariance)
        for (rank,) in ranks:
            yield (rank,), partial(low_rank_math.svd_factors, weight, basis, rank), float(energy[rank])
        return
    if method == "tucker":
        for pair in ranks:
            factors = low_rank_math.tucker_factors(weight, cast("tuple[int, int]", pair), covariance, damping)
            error = low_rank_math.relative_error(weight, low_rank_math.compose(factors), covariance)
            yield pair, partial(tuple[Tensor, ...], factors), error
        return
    order = method.removeprefix("spatial-")
    split = low_rank_math.SpatialSplit(weight, order, max(rank for (rank,) in ranks), covariance, damping)
    for (rank,) in ranks:
        yield (rank,), partial(split.factors, rank), split.error(rank)


def candidate_ranks(layer: nn.Module, method: str, step: int = CHANNEL_MULTIPLE) -> list[tuple[int, ...]]:
    """Ranks worth trying: multiples of `step` below full rank; none where the method does not fit the layer."""
    (whole,) = geometry(layer)
    if method != "svd" and (whole.is_linear or whole.kernel == (1, 1)):
        return []
    if method.startswith("spatial") and 1 in whole.kernel:
        return []
    most = largest_rank(layer, method)
    ranks: list[tuple[int, ...]] = []
    last = 0
    for rank in range(step, most[0], step):
        if rank < last * _GROWTH[method]:
            continue
        if method != "tucker":
            ranks.append((rank,))
        else:
            # The core keeps the layer's own ratio of inputs to outputs.
            outputs = step * max(1, round(rank * most[1] / most[0] / step))
            if outputs >= most[1]:
                continue
            ranks.append((rank, outputs))
        last = rank
    return ranks


def chain(factors: Sequence[Factor], shape: tuple[int, ...]) -> list[Stage]:
    """Each factor with the shape of what reaches it; the first takes `shape`."""
    stages = []
    shape = (1, *shape[1:])
    for factor in factors:
        stages.append((factor, shape))
        shape = output_shape(factor, shape)
    return stages


def output_shape(factor: Factor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what a factor makes of an input of `shape`."""
    if factor.is_linear:
        return (*shape[:-1], factor.outputs)
    sides = (
        (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for side, padding, dilation, kernel, stride in zip(
            shape[2:], factor.padding, factor.dilation, factor.kernel, factor.stride, strict=True
        )
    )
    return (shape[0], factor.outputs, *sides)


def macs(stages: Sequence[Stage]) -> int:
    """Multiply–adds of a chain for one image."""
    return sum(
        factor.num_weights * math.prod(output_shape(factor, shape)) // factor.outputs
        for factor, shape in stages
    )


def install(chain: nn.Sequential, option: Option) -> None:
    """Write an option's weights into the chain that `LowRankEdit` built for it."""
    with torch.no_grad():
        for layer, factor in zip(chain, option.factors, strict=True):
            weight = cast(Tensor, layer.weight)
            weight.copy_(factor.reshape(weight.shape))
        if option.bias is not None:
            cast(Tensor, chain[-1].bias).copy_(option.bias)
