"""From values seen on calibration images to the range a tensor is rounded in.

Values are counted in bins whose width is a power of two, aligned at zero; where values go beyond the last bin, bins are
merged in pairs. So one pass over the images is enough, counts do not depend on the images' order, and memory not on
their number. Ranges are read off the counts:

- "minmax": everything seen. One outlier costs everyone else precision.
- "moving-average": the mean over batches of each batch's extremes (Jacob et al., CVPR 2018, section 3.1).
- "percentile": all but the rarest share on either side (Wu et al., arXiv 2004.09602).
- "mse": the least mean squared error of rounding and clipping together (Banner et al., NeurIPS 2019; Nagel et al.,
  arXiv 2106.08295, section 3.1).
- "entropy": the least Kullback-Leibler divergence from the histogram before (Migacz, GTC 2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from cveff.compress.quant.fake_quant import FakeQuantize, Grid
from cveff.errors import StepError

Method = Literal["minmax", "moving-average", "percentile", "mse", "entropy"]

BINS = 2048
"""On either side of zero; at least half of them are in use."""
PERCENTILE = 99.999
_SHRINK = 80
"""Candidates for each end of a range, from the whole down to a fifth."""
_LEAST = 0.2


class Histogram:
    """Counts of a tensor's values.

    Attributes:
        low, high: the least and greatest value seen.
        width: of a bin, a power of two; 0 until a value other than zero is seen.
        counts: (2 · BINS,) float64; the first bin begins at -BINS · width.
        extremes: least and greatest value of each batch.
    """

    def __init__(self) -> None:
        self.low, self.high, self.width = math.inf, -math.inf, 0.0
        self.counts = np.zeros(2 * BINS)
        self.extremes: list[tuple[float, float]] = []

    def add(self, values: Tensor) -> None:
        """Count a batch.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        low, high = (float(value) for value in torch.aminmax(values.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or infinity")
        self.extremes.append((low, high))
        self.low, self.high = min(self.low, low), max(self.high, high)
        reach = max(-low, high)
        if reach > BINS * self.width:
            self._widen(2.0 ** math.ceil(math.log2(reach / BINS)))
        if self.width == 0:
            self.counts[BINS] += values.numel()
            return
        edge = BINS * self.width
        counted = torch.histc(values.detach().float(), 2 * BINS, -edge, edge)
        self.counts += counted.double().numpy()

    def _widen(self, width: float) -> None:
        while 0 < self.width < width:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(merged, BINS // 2)
            self.width *= 2
        self.width = width

    @property
    def centres(self) -> np.ndarray:
        """(2 · BINS,) the middle of each bin."""
        return (np.arange(2 * BINS) - BINS + 0.5) * self.width


class Watch:
    """Histograms of the tensors that `FakeQuantize`s see, while a network runs unrounded.

    Args:
        roundings: by tensor's name.
    """

    def __init__(self, network: nn.Module, roundings: Mapping[str, FakeQuantize]) -> None:
        self._network, self._roundings = network, roundings
        self.histograms = {name: Histogram() for name in roundings}

    def see(self, batches: Iterable[Tensor]) -> None:
        """Count what the network computes for images (B, C, H, W), normalised.

        Raises:
            StepError: a tensor holds NaN or infinity; the message names it.
        """

        def count(name: str, values: Tensor) -> None:
            try:
                self.histograms[name].add(values)
            except ValueError as error:
                raise StepError(
                    f"{name} holds {error} on calibration images; the network overflows there in float32"
                ) from error

        handles = [
            rounding.register_forward_pre_hook(lambda _, args, name=name: count(name, args[0]))
            for name, rounding in self._roundings.items()
        ]
        try:
            with torch.no_grad(), rounding_off(self._network):
                for images in batches:
                    self._network(images)
        finally:
            for handle in handles:
                handle.remove()

    def ranges(self, method: Method) -> dict[str, tuple[float, float]]:
        """Every tensor's range."""
        return {
            name: find_range(histogram, self._roundings[name].grid, method)
            for name, histogram in self.histograms.items()
        }


def drift(
    before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]
) -> tuple[float, str]:
    """The largest change of an end of a range, relative to the range's width, and the tensor it happened to."""
    worst, where = 0.0, ""
    for name, (low, high) in after.items():
        change = max(abs(low - before[name][0]), abs(high - before[name][1])) / max(high - low, 1e-30)
        if change > worst:
            worst, where = change, name
    return worst, where


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
        lows, highs = zip(*histogram.extremes, strict=True)
        return min(float(np.mean(lows)), 0.0), max(float(np.mean(highs)), 0.0)
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
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1 - tail, side="left"))
    low, high = (first - BINS) * histogram.width, (last + 1 - BINS) * histogram.width
    return min(max(low, histogram.low), 0.0), max(min(high, histogram.high), 0.0)


def _least_error(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """Shrink each end in turn as long as the expected squared error falls."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    shares = np.linspace(1, _LEAST, _SHRINK)
    values, counts = _seen(histogram)
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


def _seen(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Middles and counts of the bins between the least and the greatest value."""
    used = np.flatnonzero(histogram.counts)
    span = slice(used[0], used[-1] + 1)
    return histogram.centres[span], histogram.counts[span]


def _error(values: np.ndarray, counts: np.ndarray, grid: Grid, low: float, high: float) -> float:
    scale, zero = (float(item) for item in grid.steps(torch.tensor(low), torch.tensor(high)))
    rounded = (np.clip(np.round(values / scale) + zero, grid.low, grid.high) - zero) * scale
    return float(counts @ np.square(rounded - values))


def _least_divergence(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """Of the ranges that keep the centre of the counts, the one whose coarse histogram says the most of the fine
    one."""
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
    values, counts = _seen(histogram)
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


def weight_range(
    weight: Tensor, axis: int, grid: Grid, method: Literal["minmax", "mse"] = "minmax"
) -> tuple[Tensor, Tensor]:
    """(size,) minimum and maximum of each channel of `axis`; with "mse" shrunk to the least squared error of
    rounding."""
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
