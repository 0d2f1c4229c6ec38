"""Parts of the report that show pictures, plots and tables; every string from outside goes through `escape`."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from cveff.export.report_plots import Bar, Stage, confusion_matrix, layer_bars, waterfall

MAX_MATRIX_CLASSES = 30
"""Past this many classes the matrix is unreadable and the most confused pairs are listed instead."""
MAX_BARS = 60
ENGINE_NAMES = {
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-cuda": "ONNX Runtime (CUDA)",
    "onnxruntime-tensorrt": "ONNX Runtime (TensorRT)",
    "onnxruntime-coreml": "ONNX Runtime (CoreML)",
    "onnxruntime-qnn": "ONNX Runtime (QNN)",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "aot-inductor": "AOTInductor",
}
THUMBNAIL = 128


@dataclass(frozen=True)
class Sample:
    """One prediction of the deployed model.

    Attributes:
        image: (H, W, C) uint8, what the model saw.
        predicted: label, with `probability` in 0..1.
        truth: label, or None where there are no labels.
        reference: what the original module predicts.
        note: a line beneath, such as the stage it left at.
    """

    image: np.ndarray
    predicted: str
    probability: float
    truth: str | None
    reference: str
    note: str = ""


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


def steps_section(manifest: Mapping[str, Any]) -> str:
    """What each step did to time and accuracy, the shipped file last; "" where the recipe had no steps."""
    steps = manifest.get("steps") or []
    if not steps:
        return ""
    chosen = next((entry for entry in manifest["candidates"] if entry["chosen"]), None)
    names = [_step_name(step["kind"]) for step in steps]
    stages = [
        Stage(name, step["latency_ms"], step["accuracy"])
        for name, step in zip(names, steps, strict=True)
        if step["latency_ms"] is not None
    ]
    if stages and chosen is not None and chosen["latency_ms"] is not None:
        shipped = f"shipped: {chosen['engine']} {chosen['precision']}"
        stages.append(Stage(shipped, chosen["latency_ms"], chosen["accuracy"]))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{percent(step["accuracy"])}</td>'
        f'<td class="number">{_number(step["latency_ms"], "{:.3g} ms")}</td>'
        f'<td class="number">{_number(step.get("macs"), "{:,}")}</td>'
        f'<td class="number">{step["parameters"]:,}</td></tr>'
        for name, step in zip(names, steps, strict=True)
    )
    selection = manifest["metrics"].get("selection", {})
    images = f" ({selection['count']:,} images of {selection['split']})" if "count" in selection else ""
    caption = (
        f"The model after each step: accuracy in PyTorch on the images that choices are made on{images}; times of "
        "the exported float32 files, all timed in turns. The shipped file was timed in the comparison below."
    )
    table = (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr><th>Step</th>'
        '<th class="number">Accuracy</th><th class="number">Time</th><th class="number">MACs</th>'
        f'<th class="number">Parameters</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )
    return html_section("What each step did", (waterfall(stages) if stages else "") + table)


def _step_name(kind: str) -> str:
    return "dense" if kind == "start" else kind.replace("_", " ")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def layers_section(evidence: Evidence) -> str:
    """Bars of every layer's difference; "" without layers."""
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
    return html_section("Layer by layer", f"<p>{escape(evidence.layers_title)}</p>{note}{plot}")


def confusion_section(counts: np.ndarray | None, labels: Sequence[str]) -> str:
    """The matrix, where it is readable, and the most frequent mistakes; "" without counts."""
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
    return html_section("Where it errs", body)


def samples_section(samples: Sequence[Sample]) -> str:
    """Pictures with what was predicted; "" without samples."""
    items = []
    for sample in samples:
        uri, small = _picture(sample.image)
        caption = f"{escape(sample.predicted)} {percent(sample.probability, 0)}"
        if sample.truth is not None and sample.truth != sample.predicted:
            caption = f'<span class="miss">✗ {caption}</span><br>true: {escape(sample.truth)}'
        elif sample.truth is not None:
            caption = f"✓ {caption}"
        if sample.reference != sample.predicted:
            caption += f"<br>original: {escape(sample.reference)}"
        if sample.note:
            caption += f"<br>{escape(sample.note)}"
        css = ' class="small"' if small else ""
        alt = f"image predicted as {sample.predicted}"
        items.append(
            f'<li><figure><img{css} src="{uri}" alt="{escape(alt)}">'
            f"<figcaption>{caption}</figcaption></figure></li>"
        )
    return (
        html_section("Predictions of the deployed file", f'<ul class="samples">{"".join(items)}</ul>')
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


def lines_section(title: str, lines: Iterable[tuple[str, str]]) -> str:
    """A titled table of (what, value); "" without lines."""
    rows = list(lines)
    return html_section(title, html_table(rows)) if rows else ""


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns, the first a heading; both are escaped here."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows
    )
    return f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'


def html_section(title: str, body: str) -> str:
    """A titled block; `body` is HTML already."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def percent(share: float | None, digits: int = 2) -> str:
    """0.9312 as "93.12%"; a dash for None."""
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def bytes_text(count: int) -> str:
    """1_234_567 as "1.2 MB"."""
    if count < 1_000_000:
        return f"{count / 1000:.1f} kB"
    return f"{count / 1_000_000:.1f} MB"


def engine_name(name: str) -> str:
    """As people write it."""
    return ENGINE_NAMES.get(name, name)
