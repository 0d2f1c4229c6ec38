"""`report.html`: what was measured, tried and rejected, as one page that needs nothing but a browser.

Every string that a user, a file or an engine could have written goes through `escape`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from cveff.export.report_plots import Point, Standing, accuracy_latency
from cveff.export.report_rounding import rounding_section
from cveff.export.report_sections import (
    Evidence,
    bytes_text,
    confusion_section,
    engine_name,
    html_section,
    html_table,
    layers_section,
    lines_section,
    percent,
    samples_section,
    steps_section,
)
from cveff.export.report_stages import stages_section

_TEMPLATE = Path(__file__).with_name("report.html")


def render(manifest: Mapping[str, Any], evidence: Evidence | None = None) -> str:
    """The whole page as HTML text.

    Args:
        manifest: a bundle's manifest (`files` and `schema_version` are not needed).
        evidence: plots and pictures that the manifest does not hold.
    """
    evidence = evidence or Evidence()
    model, engine = manifest["model"], manifest["engine"]
    chosen = next((entry for entry in manifest["candidates"] if entry["chosen"]), None)
    precision = chosen["precision"] if chosen else ""
    sections = [
        _warnings(evidence.warnings),
        steps_section(manifest),
        stages_section(manifest),
        _candidates(manifest),
        rounding_section(manifest),
        layers_section(evidence),
        confusion_section(evidence.confusion, manifest["labels"]),
        samples_section(evidence.samples),
        lines_section("Data", evidence.data),
        _use(manifest),
        _origin(manifest),
    ]
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{model['name']}: {engine_name(engine['name'])} {precision}".strip()),
        lead=_lead(manifest, chosen),
        figures=_figures(manifest),
        sections="\n".join(section for section in sections if section),
    )


def _lead(manifest: Mapping[str, Any], chosen: Mapping[str, Any] | None) -> str:
    model = manifest["model"]
    size = " × ".join(str(side) for side in manifest["input"]["size"])
    classes = len(manifest["labels"])
    text = f"{model['architecture']}, {model['parameters']:,} parameters, {classes} classes, {size} input."
    if chosen is not None:
        text += f" Chosen of {len(manifest['candidates'])} candidates: {chosen['why']}."
    return escape(text)


def _figures(manifest: Mapping[str, Any]) -> str:
    metrics = manifest["metrics"]
    accuracy, latency, images = metrics["accuracy"], metrics["latency_ms"], metrics["images"]
    original = _original(manifest)
    cards = []
    if accuracy["deployed"] is not None:
        points = 100 * (accuracy["deployed"] - accuracy["reference"])
        cards.append(
            (
                "Accuracy",
                percent(accuracy["deployed"]),
                f"{points:+.2f} points against {original}, {images['count']:,} {images['split']} images",
            )
        )
    cards.append(
        (
            f"Same answer as {original}",
            percent(metrics["agreement"]),
            f"of {images['count']:,} {images['split']} images",
        )
    )
    speedup = latency["reference_median"] / latency["median"]
    cards.append(
        (
            f"Time at batch {latency['batch']}",
            f"{latency['median']:.3g} ms",
            f"{speedup:.1f}× as fast as {original}, {_count(latency['threads'], 'thread')}; "
            f"9 in 10 under {latency['p90']:.3g} ms",
        )
    )
    cards.append(
        ("Model files", bytes_text(metrics["size_bytes"]), f"{manifest['model']['parameters']:,} parameters")
    )
    if metrics.get("peak_rss_bytes") is not None:
        cards.append(("Peak memory", bytes_text(metrics["peak_rss_bytes"]), "resident, fresh process"))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"
        for name, value, note in cards
    )
    return f'<dl class="figures">{items}</dl>'


def _original(manifest: Mapping[str, Any]) -> str:
    """What accuracy and times are compared with: PyTorch, or of a cascade its last network."""
    return str(manifest.get("stages", {}).get("reference", "PyTorch"))


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    return html_section(
        "Know this first", "".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings)
    )


def _candidates(manifest: Mapping[str, Any]) -> str:
    entries = manifest["candidates"]
    selection = manifest["metrics"].get("selection", {})
    labelled = any(entry["accuracy"] is not None for entry in entries)
    key = "accuracy" if labelled else "agreement"
    batch = manifest["metrics"]["latency_ms"]["batch"]
    standings = [_standing(entry) for entry in entries]
    points = [
        Point(
            f"{entry['engine']} {entry['precision']}", entry["latency_ms"], entry[key], standing, entry["why"]
        )
        for entry, standing in zip(entries, standings, strict=True)
        if entry["latency_ms"] is not None and entry[key] is not None
    ]
    reference = selection.get("reference_accuracy") if labelled else 1.0
    limit = None
    if reference is not None:
        points.append(
            Point(
                _original(manifest),
                manifest["metrics"]["latency_ms"]["reference_median"],
                reference,
                "reference",
            )
        )
        if "max_accuracy_drop" in selection:
            limit = reference - selection["max_accuracy_drop"] / 100
            # A limit far under every point would flatten the plot.
            limit = limit if limit > min(point.y for point in points) - 0.05 else None
    y_label = "Accuracy" if labelled else f"Same answer as {_original(manifest)}"
    plot = accuracy_latency(points, y_label, f"milliseconds a batch of {batch}", limit) if points else ""
    rows = "".join(
        _candidate_row(entry, standing) for entry, standing in zip(entries, standings, strict=True)
    )
    where = (
        f"{selection['count']:,} {selection['split']} images"
        if "count" in selection
        else "the selection images"
    )
    table = (
        f'<div class="scroll"><table><caption>Accuracy and agreement on {escape(where)}, '
        "from which the choice was made; "
        f"times interleaved, medians at batch {batch}.</caption><thead><tr><th>Candidate</th>"
        '<th class="number">Accuracy</th><th class="number">Agreement</th><th class="number">Time</th>'
        f'<th class="number">Size</th><th>Decision</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )
    return html_section("What was tried", plot + table + _batches(manifest))


def _standing(entry: Mapping[str, Any]) -> Standing:
    if entry["chosen"]:
        return "chosen"
    return "rejected" if entry["rejected"] else "kept"


def _candidate_row(entry: Mapping[str, Any], standing: Standing) -> str:
    time = "–" if entry["latency_ms"] is None else f"{entry['latency_ms']:.3g} ms"
    size = bytes_text(entry["size_bytes"]) if entry.get("size_bytes") else "–"
    verdict = {"chosen": "chosen", "kept": "not chosen", "rejected": "rejected", "reference": ""}[standing]
    name = escape(f"{engine_name(entry['engine'])} {entry['precision']}")
    why = escape(entry["why"])
    gap = entry.get("meaning_gap")
    if gap:
        why += escape(
            ". The engine's answers equal those of the file computed as written on "
            f"{percent(gap['agreement'])} of {gap['images']} images."
        )
    return (
        f'<tr class="{standing}"><th scope="row">{name}</th>'
        f'<td class="number">{percent(entry["accuracy"])}</td>'
        f'<td class="number">{percent(entry.get("agreement"))}</td>'
        f'<td class="number">{time}</td><td class="number">{size}</td>'
        f'<td class="why">{verdict}: {why}</td></tr>'
    )


def _batches(manifest: Mapping[str, Any]) -> str:
    latencies = manifest["metrics"].get("latencies", [])
    if len(latencies) < 2:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{item["batch"]}</th><td class="number">{item["median"]:.3g} ms</td>'
        f'<td class="number">{item["p10"]:.3g}–{item["p90"]:.3g} ms</td>'
        f'<td class="number">{item["images_per_second"]:,.0f}</td>'
        f'<td class="number">{item["reference_median"]:.3g} ms</td></tr>'
        for item in latencies
    )
    return (
        '<div class="scroll"><table><caption>The deployed file by batch size.</caption>'
        "<thead><tr><th>Batch</th>"
        '<th class="number">Median</th><th class="number">10–90%</th><th class="number">Images a second</th>'
        f'<th class="number">{escape(_original(manifest))}</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _use(manifest: Mapping[str, Any]) -> str:
    command = "pip install -r requirements.txt\npython run.py IMAGE_OR_FOLDER"
    python = (
        f"import cveff\n\nengine = cveff.runtime.open({'my.bundle'!r})"
        "\nprobabilities = engine(engine.preprocess(['image.png']))"
    )
    engine = manifest["engine"]
    rows = [
        ("Engine", engine_name(engine["name"])),
        ("File", engine["file"]),
        ("Threads", str(engine["threads"])),
        ("Options", json.dumps(engine.get("options", {}))),
    ]
    return html_section(
        "Use it",
        f"<p>Without PyTorch and without cveff, in the bundle's folder:</p><pre>{escape(command)}</pre>"
        f"<p>From Python:</p><pre>{escape(python)}</pre>{html_table(rows)}",
    )


def _origin(manifest: Mapping[str, Any]) -> str:
    parts = []
    for title, key in (
        ("Recipe", "recipe"),
        ("Versions", "versions"),
        ("Machine", "machine"),
        ("Edits", "edits"),
    ):
        value = manifest["model"].get("edits") if key == "edits" else manifest.get(key)
        if not value:
            continue
        if isinstance(value, Mapping) and all(
            not isinstance(item, (Mapping, list)) for item in value.values()
        ):
            body = html_table([(str(name), str(item)) for name, item in value.items()])
        else:
            body = f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"
        parts.append(f"<details><summary>{title}</summary>{body}</details>")
    return html_section("How it was made", "".join(parts)) if parts else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
