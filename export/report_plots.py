"""Plots of the report as SVG text: no script, font or file from elsewhere; colours follow the page's theme.

Every user-given string is escaped here; numbers are formatted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

from cveff.export.svg import short, svg, text

Standing = Literal["chosen", "kept", "rejected", "reference"]


@dataclass(frozen=True)
class Point:
    """One candidate on the accuracy–latency plot: `x` in milliseconds, `y` a share (0..1)."""

    name: str
    x: float
    y: float
    standing: Standing
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar: `value` is a relative difference, `note` is shown on hovering."""

    name: str
    value: float
    note: str = ""


def accuracy_latency(points: Sequence[Point], y_label: str, x_label: str, limit: float | None = None) -> str:
    """Scatter of candidates.

    Args:
        y_label, x_label: what the axes show.
        limit: share below which a candidate is rejected, drawn as a dashed line.
    """
    width, height = 760, 400
    left, right, top, bottom = 76, 170, 16, 48
    xs = [point.x for point in points]
    ys = [point.y for point in points] + ([limit] if limit is not None else [])
    x_ticks, x_position = _x_axis(xs, left, width - right)
    y_low, y_high = padded(min(ys), max(ys), smallest=0.01)
    y_ticks = [tick for tick in linear_ticks(100 * y_low, 100 * y_high) if tick <= 100]

    def y_position(share: float) -> float:
        return height - bottom - (share - y_low) / (y_high - y_low) * (height - bottom - top)

    parts = []
    for tick in y_ticks:
        y = y_position(tick / 100)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(left - 8, y + 4, f"{tick:g}%", "end"))
    for tick in x_ticks:
        x = x_position(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(text(x, height - bottom + 18, f"{tick:g}", "middle"))
    parts.append(text((left + width - right) / 2, height - 8, x_label, "middle"))
    parts.append(f'<g transform="rotate(-90 14 {(top + height - bottom) / 2})">')
    parts.append(text(14, (top + height - bottom) / 2, y_label, "middle") + "</g>")
    if limit is not None:
        y = y_position(limit)
        parts.append(f'<line class="limit" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(left + 6, y - 5, "accuracy limit", "start"))
    centres = [(x_position(point.x), y_position(point.y)) for point in points]
    # Of marks at one height the rightmost has the nearest label, so that leaders do not cross.
    heights = [round(y, 1) - x / 1e6 for x, y in centres]
    label_ys = _apart(heights, 17, top + 8, height - bottom)
    for point, (x, y), label_y in zip(points, centres, label_ys, strict=True):
        label_x = width - right + 22
        title = f"{point.name}: {point.x:.3g} ms, {100 * point.y:.2f}%" + (
            f"; {point.note}" if point.note else ""
        )
        parts.append(
            f'<g class="point {point.standing}"><title>{escape(title)}</title>'
            f'<path class="leader" d="M{x + 8:.1f} {y:.1f} L{width - right + 4} {label_y:.1f} '
            f'H{label_x - 4}"/>'
            f"{_mark(point.standing, x, y)}{text(label_x, label_y + 4, point.name, 'start')}</g>"
        )
    return svg("".join(parts), width, height, f"{y_label} against {x_label}, one mark a candidate")


def layer_bars(bars: Sequence[Bar], description: str) -> str:
    """Horizontal bars of relative differences on a logarithmic scale, in the given (execution) order."""
    row, left, width = 18, 250, 760
    height = row * len(bars) + 40
    # Infinite where one side overflowed: such a bar is as long as the axis.
    values = [min(max(bar.value, 1e-8), 1e3) for bar in bars]
    low = math.floor(math.log10(min(values)))
    high = max(low + 1, math.ceil(math.log10(max(values))))

    def x_position(value: float) -> float:
        return left + (math.log10(min(max(value, 10.0**low), 10.0**high)) - low) / (high - low) * (
            width - left - 60
        )

    parts = []
    for power in range(low, high + 1):
        x = x_position(10.0**power)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 30}"/>')
        parts.append(text(x, height - 14, f"{10.0**power:g}", "middle"))
    for index, bar in enumerate(bars):
        y = 6 + index * row
        name = bar.name if len(bar.name) <= 36 else "…" + bar.name[-35:]
        length = max(1.0, x_position(bar.value) - left)
        title = f"{bar.name}: {bar.value:.2e}" + (f"; {bar.note}" if bar.note else "")
        parts.append(
            f"<g><title>{escape(title)}</title>{text(left - 8, y + 12, name, 'end')}"
            f'<rect class="bar" x="{left}" y="{y}" width="{length:.1f}" height="{row - 5}" rx="2"/>'
            f"{text(left + length + 6, y + 12, f'{bar.value:.1e}', 'start')}</g>"
        )
    return svg("".join(parts), width, height, description)


@dataclass(frozen=True)
class Stage:
    """One bar of the waterfall: milliseconds after a step, and the accuracy (0..1) then; None where unknown."""

    name: str
    milliseconds: float
    accuracy: float | None


def waterfall(stages: Sequence[Stage]) -> str:
    """Time after each step as bars from zero, what the step saved hatched behind it, accuracy beside.

    Args:
        stages: in order; the first is the model the steps began with, the last may be the shipped file.
    """
    row, left, width, right = 34, 190, 760, 190
    height = row * len(stages) + 44
    longest = max(stage.milliseconds for stage in stages)
    scale = (width - left - right) / (longest or 1.0)
    parts = []
    for tick in linear_ticks(0, longest or 1.0, 5):
        x = left + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{height - 34}"/>')
        parts.append(text(x, height - 18, f"{tick:g}", "middle"))
    parts.append(text(left + (width - left - right) / 2, height - 2, "milliseconds a call", "middle"))
    parts.append(text(width - right + 108, 12, "accuracy", "start"))
    first, before = stages[0].milliseconds, stages[0].milliseconds
    for index, stage in enumerate(stages):
        y, length = 20 + index * row, stage.milliseconds * scale
        kind = "shipped" if index == len(stages) - 1 and index else "bar"
        title = _stage_text(stage, first)
        parts.append(
            f"<g><title>{escape(title)}</title>{text(left - 8, y + 16, short(stage.name, 26), 'end')}"
        )
        if before > stage.milliseconds:
            saved = (before - stage.milliseconds) * scale
            parts.append(
                f'<rect class="saved" x="{left + length:.1f}" y="{y}" width="{saved:.1f}" height="{row - 12}"/>'
            )
        parts.append(
            f'<rect class="{kind}" x="{left}" y="{y}" width="{max(1.0, length):.1f}" height="{row - 12}" rx="2"/>'
        )
        parts.append(
            text(left + max(length, before * scale) + 8, y + 16, f"{stage.milliseconds:.3g} ms", "start")
        )
        accuracy = "–" if stage.accuracy is None else f"{100 * stage.accuracy:.2f}%"
        parts.append(text(width - right + 108, y + 16, accuracy, "start") + "</g>")
        before = stage.milliseconds
    described = "; ".join(_stage_text(stage, first) for stage in stages)
    return svg("".join(parts), width, height, f"Time and accuracy after each step: {described}")


def _stage_text(stage: Stage, first: float) -> str:
    accuracy = "" if stage.accuracy is None else f", accuracy {100 * stage.accuracy:.2f}%"
    share = f" ({100 * stage.milliseconds / first:.0f}% of the first)" if first > 0 else ""
    return f"{stage.name} {stage.milliseconds:.3g} ms{share}{accuracy}"


def confusion_matrix(counts: np.ndarray, labels: Sequence[str]) -> str:
    """Heat map of a confusion matrix.

    Args:
        counts: (classes, classes) int, rows are the true classes.
        labels: one a class.
    """
    classes = len(labels)
    cell = max(14, min(40, 560 // classes))
    longest = max(len(short(label)) for label in labels)
    left, top = 24 + 7 * longest, 24 + int(5.6 * longest)
    size = cell * classes
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares = counts / totals
    parts = []
    for row in range(classes):
        y = top + row * cell
        parts.append(text(left - 8, y + cell / 2 + 4, short(labels[row]), "end"))
        x = left + row * cell + cell / 2
        name = text(x, top - 8, short(labels[row]), "start")
        parts.append(f'<g transform="rotate(-50 {x:.1f} {top - 8})">{name}</g>')
        for column in range(classes):
            count, share = int(counts[row, column]), float(shares[row, column])
            x = left + column * cell
            box = f'x="{x}" y="{y}" width="{cell}" height="{cell}"'
            kind = "right" if row == column else "wrong"
            # Errors are rare: their shade grows with the root of the share, so that one in a hundred shows.
            shade = 0.0 if count == 0 else 0.12 + 0.88 * math.sqrt(share)
            title = f"{labels[row]} taken for {labels[column]}: {count} of {int(totals[row, 0])}"
            parts.append(
                f'<g><title>{escape(title)}</title><rect class="cell" {box}/>'
                f'<rect class="{kind}" {box} fill-opacity="{shade:.2f}"/>'
            )
            if count and cell >= 22:
                tone = " inverse" if shade > 0.55 else ""
                parts.append(
                    f'<text class="count{tone}" x="{x + cell / 2}" y="{y + cell / 2 + 4}" '
                    f'text-anchor="middle">{count}</text>'
                )
            parts.append("</g>")
    parts.append(text(left + size / 2, top + size + 20, "predicted (columns) against true (rows)", "middle"))
    return svg("".join(parts), left + size + 90, top + size + 32, "Confusion matrix of the deployed model")


def _x_axis(
    values: Sequence[float], start: float, end: float
) -> tuple[list[float], Callable[[float], float]]:
    """Ticks and position function: linear from zero, logarithmic where the values span more than sixfold."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 6:
        log_low, log_high = math.log10(low * 0.85), math.log10(high * 1.15)

        def logarithmic(value: float) -> float:
            return start + (math.log10(value) - log_low) / (log_high - log_low) * (end - start)

        powers = range(math.floor(log_low), math.ceil(log_high) + 1)
        ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        return [tick for tick in ticks if 10**log_low <= tick <= 10**log_high], logarithmic
    top = high * 1.1 or 1.0

    def linear(value: float) -> float:
        return start + value / top * (end - start)

    return linear_ticks(0, top), linear


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(step * index, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(low: float, high: float, smallest: float) -> tuple[float, float]:
    """The range with room on both sides, and at least `smallest` wide before that."""
    room = max(high - low, smallest) * 0.15
    middle, half = (low + high) / 2, max(high - low, smallest) / 2 + room
    return middle - half, middle + half


def _apart(positions: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Move positions as little as needed so that neighbours are `distance` apart, keeping their order."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = [0.0] * len(positions)
    previous = low - distance
    for index in order:
        placed[index] = previous = max(positions[index], previous + distance)
    overflow = previous - high
    ceiling = high
    if overflow > 0:
        for index in reversed(order):
            placed[index] = min(placed[index], ceiling)
            ceiling = placed[index] - distance
    return placed


def _mark(standing: Standing, x: float, y: float) -> str:
    if standing == "reference":
        return f'<path class="mark" d="M{x:.1f} {y - 7:.1f} l7 7 l-7 7 l-7 -7 z"/>'
    return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{8 if standing == "chosen" else 6}"/>'
