"""Parts of the report that only staged bundles have: accuracy over time as thresholds vary, where images leave, and
easy and hard images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from cveff.export.report_plots import linear_ticks, padded
from cveff.export.report_sections import Sample, html_section, percent
from cveff.export.svg import svg, text
from cveff.runtime.engine import softmax

if TYPE_CHECKING:
    from cveff.data.dataset import Split
    from cveff.export.staged import Staged

NUM_EASY, NUM_HARD = 12, 12


def stages_section(manifest: Mapping[str, Any]) -> str:
    """The curve, and a row a stage; "" for a bundle without stages."""
    if "stages" not in manifest:
        return ""
    stages = manifest["stages"]
    calibration, evaluation, full = stages["calibration"], stages["evaluation"], stages["full"]
    seen, held = max(1, sum(evaluation["exits"])), max(1, calibration["count"])
    rows = "".join(
        f'<tr><th scope="row">{escape(entry["stage"])}</th><td class="number">{_threshold(entry, stages["files"])}</td>'
        f'<td class="number">{percent(entry["exits"] / held)}</td><td class="number">{percent(left / seen)}</td>'
        f'<td class="number">{milliseconds:.3g} ms</td></tr>'
        for entry, left, milliseconds in zip(
            stages["files"], evaluation["exits"], stages["latency_ms"], strict=True
        )
    )
    caption = (
        f"An image leaves a stage where its {stages['gate']} reaches the threshold. Thresholds were chosen on "
        f"{calibration['count']:,} images of {calibration['split']}; the next column is of "
        f"{evaluation['count']:,} images "
        f"of {evaluation['split']}. The time is of one image that leaves there; {full['name']} takes "
        f"{full['latency_ms']:.3g} ms."
    )
    table = (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr><th>Stage</th>'
        f'<th class="number">Threshold</th><th class="number">{escape(str(calibration["split"]))}</th>'
        f'<th class="number">{escape(str(evaluation["split"]))}</th><th class="number">Time</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    note = (
        '<p class="note">Every point is a choice of thresholds that no other beats in both, on the images they were '
        "chosen on; the filled one ships. Other thresholds can be set when the bundle is open.</p>"
    )
    return html_section("Where images leave", threshold_curve(stages["curve"], calibration) + note + table)


def threshold_curve(curve: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> str:
    """Accuracy against mean time as a share of the whole network's, a step line; `chosen` is marked."""
    width, height, left, right, top, bottom = 760, 320, 76, 30, 16, 48
    points = [(entry["mean_latency"], entry["accuracy"]) for entry in (*curve, chosen)]
    x_top = 1.05 * max(1.0, *(x for x, _ in points))
    y_low, y_high = padded(min(y for _, y in points), max(y for _, y in points), smallest=0.01)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + x / x_top * (width - left - right),
            height - bottom - (y - y_low) / (y_high - y_low) * (height - bottom - top),
        )

    parts = []
    for tick in linear_ticks(100 * y_low, 100 * y_high):
        if tick <= 100:
            _, y = place(0, tick / 100)
            parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(text(left - 8, y + 4, f"{tick:g}%", "end"))
    for tick in linear_ticks(0, x_top):
        x, _ = place(tick, y_low)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(text(x, height - bottom + 18, f"{tick:g}", "middle"))
    parts.append(
        text((left + width - right) / 2, height - 8, "mean time, as a share of the whole network's", "middle")
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points[:-1]))
    parts.append(f'<polyline class="mark" style="fill:none" points="{line}"/>')
    x, y = place(*points[-1])
    title = f"{points[-1][0]:.3f} of the time, {percent(points[-1][1])}"
    parts.append(
        f'<g class="point chosen"><title>{escape(title)}</title>'
        f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="6"/></g>'
    )
    return svg("".join(parts), width, height, "Accuracy against mean time as thresholds vary")


def pictures(split: Split, labels: Sequence[str], staged: Staged) -> list[Sample]:
    """Hard images, that left last and least certain of their answers, then easy ones, that left first and most
    certain."""
    probability = softmax(staged.logits).max(axis=1)
    predicted, original = staged.logits.argmax(axis=1), staged.reference_logits.argmax(axis=1)
    hard = np.lexsort((probability, -staged.left))[:NUM_HARD]
    easy = [index for index in np.lexsort((-probability, staged.left)) if index not in set(hard.tolist())]
    found = []
    for index in (*hard, *easy[:NUM_EASY]):
        picture = np.asarray(split.image(int(index)))
        found.append(
            Sample(
                image=picture if picture.ndim == 3 else picture[:, :, None],
                predicted=labels[predicted[index]],
                probability=float(probability[index]),
                truth=None if staged.targets is None else labels[staged.targets[index]],
                reference=labels[original[index]],
                note=f"left at {staged.stages.stages[staged.left[index]].name}",
            )
        )
    return found


def _threshold(entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    if entry is entries[-1]:
        return "the rest"
    return "none leave" if entry["threshold"] is None else f"{entry['threshold']:.4f}"
