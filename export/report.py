"""`report.html`: what was measured, tried and rejected, as one page that needs nothing but a browser.

Every string that a user, a file or an engine could have written goes through `escape`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from cveff.export.report_plots import Bar, Point, Standing, accuracy_latency, confusion_matrix, layer_bars

MAX_MATRIX_CLASSES = 30
"""Past this many classes the matrix is unreadable and the most confused pairs are listed instead."""
MAX_BARS = 60
THUMBNAIL = 128

_TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class Sample:
    """One prediction of the deployed model.

    Attributes:
        image: (H, W, C) uint8, what the model saw.
        predicted: label, with `probability` in 0..1.
        truth: label, or None where there are no labels.
        reference: what the original module predicts.
    """

    image: np.ndarray
    predicted: str
    probability: float
    truth: str | None
    reference: str


@dataclass(frozen=True)
class Evidence:
    """What the report shows beyond the manifest.

    Attributes:
        confusion: (classes, classes) int, rows true; None without labels.
        samples: predictions to show, wrong ones first.
        layers: relative difference of each layer, in execution order.
        layers_title: which two graphs `layers` compares.
        data: (what, value) lines on the data.
        warnings: what a reader must know before trusting the figures.
    """

    confusion: np.ndarray | None = None
    samples: Sequence[Sample] = ()
    layers: Sequence[Bar] = ()
    layers_title: str = ""
    data: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = field(default_factory=tuple)


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
        _candidates(manifest),
        _layers(evidence),
        _confusion(evidence.confusion, manifest["labels"]),
        _samples(evidence.samples),
        _lines("Data", evidence.data),
        _use(manifest),
        _origin(manifest),
    ]
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{model['name']}: {engine['name']} {precision}".strip()),
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
    cards = []
    if accuracy["deployed"] is not None:
        points = 100 * (accuracy["deployed"] - accuracy["reference"])
        cards.append(
            (
                "Accuracy",
                _percent(accuracy["deployed"]),
                f"{points:+.2f} points against PyTorch, {images['count']:,} {images['split']} images",
            )
        )
    cards.append(
        (
            "Same answer as PyTorch",
            _percent(metrics["agreement"]),
            f"of {images['count']:,} {images['split']} images",
        )
    )
    speedup = latency["reference_median"] / latency["median"]
    cards.append(
        (
            f"Time at batch {latency['batch']}",
            f"{latency['median']:.3g} ms",
            f"{speedup:.1f}× as fast as PyTorch, {latency['threads']} threads; "
            f"9 in 10 under {latency['p90']:.3g} ms",
        )
    )
    cards.append(
        ("Model files", _bytes(metrics["size_bytes"]), f"{manifest['model']['parameters']:,} parameters")
    )
    if metrics.get("peak_rss_bytes") is not None:
        cards.append(("Peak memory", _bytes(metrics["peak_rss_bytes"]), "resident, fresh process"))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"
        for name, value, note in cards
    )
    return f'<dl class="figures">{items}</dl>'


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    return _section(
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
            Point("PyTorch", manifest["metrics"]["latency_ms"]["reference_median"], reference, "reference")
        )
        if "max_accuracy_drop" in selection:
            limit = reference - selection["max_accuracy_drop"] / 100
            # A limit far under every point would flatten the plot.
            limit = limit if limit > min(point.y for point in points) - 0.05 else None
    y_label = "Accuracy" if labelled else "Same answer as PyTorch"
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
    return _section("What was tried", plot + table + _batches(manifest))


def _standing(entry: Mapping[str, Any]) -> Standing:
    if entry["chosen"]:
        return "chosen"
    return "rejected" if entry["rejected"] else "kept"


def _candidate_row(entry: Mapping[str, Any], standing: Standing) -> str:
    time = "–" if entry["latency_ms"] is None else f"{entry['latency_ms']:.3g} ms"
    size = _bytes(entry["size_bytes"]) if entry.get("size_bytes") else "–"
    verdict = {"chosen": "chosen", "kept": "kept to the limits", "rejected": "rejected", "reference": ""}[
        standing
    ]
    why = escape(entry["why"])
    gap = entry.get("meaning_gap")
    if gap:
        why += escape(
            " The engine's answers equal those of the file computed as written on "
            f"{_percent(gap['agreement'])} of {gap['images']} images."
        )
    return (
        f'<tr class="{standing}"><th scope="row">{escape(entry["engine"])} {escape(entry["precision"])}</th>'
        f'<td class="number">{_percent(entry["accuracy"])}</td>'
        f'<td class="number">{_percent(entry.get("agreement"))}</td>'
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
        f'<th class="number">PyTorch</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _layers(evidence: Evidence) -> str:
    if not evidence.layers:
        return ""
    layers = evidence.layers
    note = ""
    if len(layers) > MAX_BARS:
        worst = sorted(range(len(layers)), key=lambda index: -layers[index].value)[:MAX_BARS]
        layers = [layers[index] for index in sorted(worst)]
        note = f"The {MAX_BARS} largest of {len(evidence.layers)} layers, in execution order."
        note = f'<p class="note">{note}</p>'
    plot = layer_bars(layers, "Relative difference of each layer")
    return _section("Layer by layer", f"<p>{escape(evidence.layers_title)}</p>{note}{plot}")


def _confusion(counts: np.ndarray | None, labels: Sequence[str]) -> str:
    if counts is None:
        return ""
    body = confusion_matrix(counts, labels) if len(labels) <= MAX_MATRIX_CLASSES else ""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:12]
    pairs = [
        (*np.unravel_index(index, wrong.shape), int(wrong.flat[index]))
        for index in order
        if wrong.flat[index]
    ]
    rows = "".join(
        f'<tr><td>{escape(labels[row])}</td><td>{escape(labels[column])}</td><td class="number">{count} of '
        f"{int(counts[row].sum())}</td></tr>"
        for row, column, count in pairs
    )
    if rows:
        body += (
            '<div class="scroll"><table><caption>Most frequent mistakes</caption>'
            '<thead><tr><th>True</th><th>Predicted</th><th class="number">Images</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    else:
        body += "<p>No mistakes on these images.</p>"
    return _section("Where it errs", body)


def _samples(samples: Sequence[Sample]) -> str:
    items = []
    for sample in samples:
        uri, small = _picture(sample.image)
        caption = f"{escape(sample.predicted)} {_percent(sample.probability, 0)}"
        if sample.truth is not None and sample.truth != sample.predicted:
            caption = f'<span class="miss">✗ {caption}</span><br>true: {escape(sample.truth)}'
        elif sample.truth is not None:
            caption = f"✓ {caption}"
        if sample.reference != sample.predicted:
            caption += f"<br>PyTorch: {escape(sample.reference)}"
        css = ' class="small"' if small else ""
        alt = f"image predicted as {sample.predicted}"
        items.append(
            f'<li><figure><img{css} src="{uri}" alt="{escape(alt)}">'
            f"<figcaption>{caption}</figcaption></figure></li>"
        )
    return (
        _section("Predictions of the deployed file", f'<ul class="samples">{"".join(items)}</ul>')
        if items
        else ""
    )


def _picture(image: np.ndarray) -> tuple[str, bool]:
    """A data URI and whether the picture is so small that pixels should stay visible."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    small = max(picture.size) <= 64
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    if small:
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.save(stream, "JPEG", quality=82)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}", small


def _use(manifest: Mapping[str, Any]) -> str:
    command = "pip install -r requirements.txt\npython run.py IMAGE_OR_FOLDER"
    python = (
        f"import cveff\n\nengine = cveff.runtime.open({'my.bundle'!r})"
        "\nprobabilities = engine(engine.preprocess(['image.png']))"
    )
    engine = manifest["engine"]
    rows = [
        ("Engine", engine["name"]),
        ("File", engine["file"]),
        ("Threads", str(engine["threads"])),
        ("Options", json.dumps(engine.get("options", {}))),
    ]
    return _section(
        "Use it",
        f"<p>Without PyTorch and without cveff, in the bundle's folder:</p><pre>{escape(command)}</pre>"
        f"<p>From Python:</p><pre>{escape(python)}</pre>{_table(rows)}",
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
            body = _table([(str(name), str(item)) for name, item in value.items()])
        else:
            body = f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"
        parts.append(f"<details><summary>{title}</summary>{body}</details>")
    return _section("How it was made", "".join(parts)) if parts else ""


def _lines(title: str, lines: Iterable[tuple[str, str]]) -> str:
    rows = list(lines)
    return _section(title, _table(rows)) if rows else ""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows
    )
    return f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _percent(share: float | None, digits: int = 2) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def _bytes(count: int) -> str:
    if count < 1_000_000:
        return f"{count / 1000:.1f} kB"
    return f"{count / 1_000_000:.1f} MB"
