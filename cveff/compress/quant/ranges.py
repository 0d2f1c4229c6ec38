"""From values seen on calibration images to the range a tensor is rounded in.

Two passes over the images: the first finds how far values reach, the second counts them in equal bins, from which every
method takes its range. So a range does not depend on the order of the images, and memory not on their number.

- "minmax": everything seen. One outlier costs everyone else precision.
- "moving-average": the mean over batches of each batch's extremes (Jacob et al., CVPR 2018, section 3.1).
- "percentile": all but the rarest share on either side (Wu et al., arXiv 2004.09602).
- "mse": the least mean squared error of rounding and clipping together (Banner et al., NeurIPS 2019; Nagel et al.,
  arXiv 2106.08295, section 3.1).
- "entropy": the least Kullback-Leibler divergence from the histogram before (Migacz, GTC 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from cveff.compress.quant.fake_quant import FakeQuantize, Grid
from cveff.errors import StepError

Method = Literal["minmax", "moving-average", "percentile", "mse", "entropy"]

BINS = 2048
PERCENTILE = 99.999
_SHRINK = 80
"""Candidates for each end of a range, from the whole down to a fifth."""
_LEAST = 0.2


@dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's values in `BINS` equal bins between `low` and `high`.

    Attributes:
        low, high: the least and greatest value seen.
        counts: (BINS,) float64.
        average_low, average_high: means over batches of each batch's extremes.
    """

    low: float
    high: float
    counts: np.ndarray
    average_low: float
    average_high: float

    @property
    def centres(self) -> np.ndarray:
        """(BINS,) the middle of each bin."""
        width = (self.high - self.low) / len(self.counts)
        return self.low + (np.arange(len(self.counts)) + 0.5) * width


class Watch:
    """Histograms of the tensors that `FakeQuantize`s see, while a network runs unrounded.

    Args:
        roundings: by tensor's name.
    """

    def __init__(self, network: nn.Module, roundings: Mapping[str, FakeQuantize]) -> None:
        self._network, self._roundings = network, roundings

    def histograms(
        self, batches: Sequence[Tensor], progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter
    ) -> dict[str, Histogram]:
        """Run the network over every batch twice.

        Args:
            batches: images (B, C, H, W), normalised.

        Raises:
            StepError: there are no images, or a tensor holds NaN or infinity; the message names it.
        """
        if not batches:
            raise StepError("there are no calibration images; give at least one, better 100 to 500")
        extremes: dict[str, list[tuple[float, float]]] = {name: [] for name in self._roundings}

        def extent(name: str, values: Tensor) -> None:
            low, high = (float(value) for value in torch.aminmax(values.detach()))
            if not (np.isfinite(low) and np.isfinite(high)):
                raise StepError(
                    f"{name} holds NaN or infinity on calibration images; the network overflows there in float32"
                )
            extremes[name].append((low, high))

        self._run(batches, extent, progress)
        ends = {name: (min(low for low, _ in seen), max(high for _, high in seen)) for name, seen in extremes.items() if seen}
        counts = {name: np.zeros(BINS) for name in ends}

        def count(name: str, values: Tensor) -> None:
            low, high = ends[name]
            if high > low:
                counts[name] += torch.histc(values.detach().float(), BINS, low, high).double().numpy()
            else:
                counts[name][0] += values.numel()

        self._run(batches, count, progress)
        return {
            name: Histogram(
                *ends[name],
                counts[name],
                float(np.mean([low for low, _ in extremes[name]])),
                float(np.mean([high for _, high in extremes[name]])),
            )
            for name in ends
        }

    def _run(
        self,
        batches: Sequence[Tensor],
        look: Callable[[str, Tensor], None],
        progress: Callable[[Iterable[Tensor]], Iterable[Tensor]],
    ) -> None:
        handles = [
            rounding.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0]))
            for name, rounding in self._roundings.items()
        ]
        try:
            with torch.no_grad(), rounding_off(self._network):
                for images in progress(batches):
                    self._network(images)
        finally:
            for handle in handles:
                handle.remove()


class rounding_off:  # noqa: N801 (it reads as a verb: with rounding_off(network))
    """While it is open, the network (or only the given roundings) computes in floats."""

    def __init__(self, network: nn.Module, only: Iterable[FakeQuantize] | None = None) -> None:
        chosen = network.modules() if only is None else only
        self._parts = [part for part in chosen if isinstance(part, FakeQuantize)]

    def __enter__(self) -> None:
        self._before = [part.enabled for part in self._parts]
        for part in self._parts:
            part.enabled = False

    def __exit__(self, *_: object) -> None:
        for part, enabled in zip(self._parts, self._before, strict=True):
            part.enabled = enabled


def find_range(histogram: Histogram, grid: Grid, method: Method) -> tuple[float, float]:
    """The range of a tensor; zero is in it.

    Raises:
        StepError: the method is unknown.
    """
    if method not in get_args(Method):
        raise StepError(f"calibration method {method!r} is unknown; use one of {', '.join(get_args(Method))}")
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if high <= low:
        return 0.0, 0.0
    if method == "moving-average":
        return min(histogram.average_low, 0.0), max(histogram.average_high, 0.0)
    if method == "percentile":
        return _percentile(histogram)
    if method == "mse":
        return _least_error(histogram, grid)
    if method == "entropy":
        return _least_divergence(histogram, grid)
    return low, high


def _percentile(histogram: Histogram) -> tuple[float, float]:
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    tail = (100 - PERCENTILE) / 100
    width = (histogram.high - histogram.low) / len(share)
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1 - tail, side="left"))
    low, high = histogram.low + first * width, histogram.low + (last + 1) * width
    return min(low, 0.0), max(min(high, histogram.high), 0.0)


def _least_error(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """Shrink each end in turn as long as the expected squared error falls."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    shares = np.linspace(1, _LEAST, _SHRINK)
    values, counts = histogram.centres, histogram.counts
    if grid.symmetric:
        reach = max(-low, high)
        errors = [_error(values, counts, grid, -reach * share, reach * share) for share in shares]
        best = reach * float(shares[int(np.argmin(errors))])
        return -best, best
    for _ in range(2):
        errors = [_error(values, counts, grid, low, high * share) for share in shares]
        high *= float(shares[int(np.argmin(errors))])
        errors = [_error(values, counts, grid, low * share, high) for share in shares]
        low *= float(shares[int(np.argmin(errors))])
    return low, high


def _error(values: np.ndarray, counts: np.ndarray, grid: Grid, low: float, high: float) -> float:
    scale, zero = (float(item) for item in grid.steps(torch.tensor(low), torch.tensor(high)))
    rounded = (np.clip(np.round(values / scale) + zero, grid.low, grid.high) - zero) * scale
    return float(counts @ np.square(rounded - values))


def _least_divergence(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """Of the ranges that keep the centre of the counts, the one whose coarse histogram says the most of the fine one."""
    levels = grid.high - grid.low + 1
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    best, found = np.inf, (low, high)
    for share in np.linspace(1, _LEAST, _SHRINK):
        start, stop = low * share, high * share
        if grid.symmetric:
            reach = max(-low, high) * share
            start, stop = -reach, reach
        divergence = _divergence(histogram, start, stop, levels)
        if divergence < best:
            best, found = divergence, (float(start), float(stop))
    return found


def _divergence(histogram: Histogram, low: float, high: float, levels: int) -> float:
    values, counts = histogram.centres, histogram.counts
    inside = (values >= low) & (values <= high)
    if not inside.any():
        return float("inf")
    # What is clipped is counted at the ends: there it will be.
    reference = counts[inside].copy()
    reference[0] += counts[values < low].sum()
    reference[-1] += counts[values > high].sum()
    level = np.clip(((values[inside] - low) / (high - low) * levels).astype(int), 0, levels - 1)
    used = counts[inside] > 0
    totals = np.bincount(level, counts[inside], levels)
    members = np.bincount(level, used, levels)
    coarse = np.where(used, totals[level] / np.maximum(members[level], 1), 0)
    p, q = reference / reference.sum(), coarse / max(coarse.sum(), 1e-30)
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))).sum())


def weight_range(weight: Tensor, axis: int, grid: Grid, method: Literal["minmax", "mse"] = "minmax") -> tuple[Tensor, Tensor]:
    """(size,) minimum and maximum of each channel of `axis`; with "mse" shrunk to the least squared error of rounding."""
    flat = weight.detach().movedim(axis, 0).flatten(1)
    reach = flat.abs().amax(1)
    if method == "minmax":
        return -reach, reach
    best, chosen = torch.full_like(reach, torch.inf), reach.clone()
    for share in np.linspace(1, _LEAST, _SHRINK):
        scale, _ = grid.steps(-reach * share, reach * share)
        step = scale[:, None]
        rounded = (flat / step).round().clamp(grid.low, grid.high) * step
        error = (rounded - flat).square().sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, reach * share, chosen)
    return -chosen, chosen
