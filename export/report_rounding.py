"""The report's section on integers: which layers and tensors are rounded, how finely, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from cveff.export.report_plots import Bar, layer_bars
from cveff.export.report_sections import engine_name, html_section
from cveff.export.svg import svg, text

MOST = 60
"""Rows of a plot or table; past it, those that cost most."""


@dataclass(frozen=True)
class Extent:
    """A tensor: the range that is kept, and the least and greatest value that was seen."""

    name: str
    kept: tuple[float, float]
    seen: tuple[float, float]
    note: str = ""


def range_bars(extents: Sequence[Extent]) -> str:
    """Of each tensor the range that is kept as a bar within a line of what was seen, one row each.

    Rows have scales of their own (the widest of both fills the row) with zero in the middle; ends are written out.
    """
    row, left, width, right = 18, 250, 760, 150
    height = row * len(extents) + 12
    middle, half = (left + width - right) / 2, (width - right - left) / 2
    parts = [
        f'<line class="grid" x1="{middle:.1f}" x2="{middle:.1f}" y1="4" y2="{height - 6}"/>',
    ]
    for index, extent in enumerate(extents):
        y = 6 + index * row
        reach = max(abs(value) for value in (*extent.kept, *extent.seen)) or 1.0
        low, high = (middle + half * value / reach for value in extent.kept)
        first, last = (middle + half * value / reach for value in extent.seen)
        words = f"{extent.kept[0]:.3g} to {extent.kept[1]:.3g}"
        title = f"{extent.name}: {words} kept, {extent.seen[0]:.3g} to {extent.seen[1]:.3g} seen"
        title += f"; {extent.note}" if extent.note else ""
        name = extent.name if len(extent.name) <= 36 else "…" + extent.name[-35:]
        centre = y + (row - 5) / 2
        parts.append(
            f"<g><title>{escape(title)}</title>{text(left - 8, y + 11, name, 'end')}"
            f'<rect class="bar" x="{low:.1f}" y="{y}" width="{max(1.0, high - low):.1f}" height="{row - 5}" rx="2"/>'
            f'<line class="seen" x1="{first:.1f}" x2="{last:.1f}" y1="{centre:.1f}" y2="{centre:.1f}"/>'
            f"{text(width - right + 10, y + 11, words, 'start')}</g>"
        )
    return svg(
        "".join(parts), width, height, "Ranges that are kept, of what was seen on the calibration images"
    )


def rounding_section(manifest: Mapping[str, Any]) -> str:
    """Ranges and costs of every file in integers that cveff wrote itself; "" without one."""
    parts = [
        _file(f"{engine_name(entry['engine'])} {entry['precision']}", entry["rounding"])
        for entry in manifest["candidates"]
        if entry.get("rounding")
    ]
    return html_section("What was rounded", "".join(parts)) if parts else ""


def _file(name: str, rounding: Mapping[str, Any]) -> str:
    layers, tensors = rounding["layers"], rounding["tensors"]
    floats = [layer for layer in layers if layer["precision"] != "int8"]
    narrowed = sum(layer["narrowed"] > 0 for layer in layers)
    lead = (
        f"{name}: {len(layers) - len(floats)} of {len(layers)} layers in 8 bits. Ranges by {rounding['method']} from "
        f"{rounding['images']} images; on images they were not made from, the logits' error is "
        f"{100 * rounding['error']:.2g}% of their energy."
    )
    if narrowed:
        lead += f" {narrowed} layers have channels with wider steps, whose sums processors without VNNI would clip."
    body = f"<h3>{escape(name)}</h3><p>{escape(lead)}</p>"
    if floats:
        rows = "".join(
            f'<tr><th scope="row">{escape(layer["name"])}</th><td class="why">{escape(layer["why"])}</td></tr>'
            for layer in floats
        )
        body += (
            '<div class="scroll"><table><caption>Left in floats</caption><thead><tr><th>Layer</th><th>Because</th>'
            f"</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    costs = [
        Bar(item["name"] + kind, item["nats"], _decibels(item["decibels"]))
        for items, kind in ((layers, ", weight"), (tensors, ""))
        for item in items
        if item["nats"]
    ]
    if costs:
        worst = sorted(costs, key=lambda bar: -bar.value)[:MOST]
        body += (
            "<p>What each rounding does to the answers by itself, in nats of divergence, the largest first; signal to "
            f"noise on hovering.</p>{layer_bars(worst, 'Divergence of the answers that each rounding causes')}"
        )
    extents = [
        Extent(
            tensor["name"],
            (tensor["low"], tensor["high"]),
            tuple(tensor["seen"]),
            _decibels(tensor["decibels"]),
        )
        for tensor in _costliest(tensors)
        if tensor["seen"]
    ]
    if extents:
        body += (
            "<p>Ranges that are kept (bars) of all values seen on the calibration images (lines); what lies outside a "
            f"bar is clipped.</p>{range_bars(extents)}"
        )
    return body


def _costliest(tensors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """As many as fit, in the order of the network."""
    if len(tensors) <= MOST:
        return list(tensors)
    kept = sorted(range(len(tensors)), key=lambda index: -(tensors[index]["nats"] or 0.0))[:MOST]
    return [tensors[index] for index in sorted(kept)]


def _decibels(value: float | None) -> str:
    return "" if value is None else f"signal to noise {value:.1f} dB"
