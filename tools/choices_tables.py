"""Tables of docs/ made from model_zoo/results/choices.json (tools/benchmarks/choices.py) and export_table.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Values = dict[str, Any]


def uint8_input(values: Values) -> str:
    """Time of a way to write normalisation, over that of the same graph with a normalised float input."""
    names = {
        "channel, scale": "a value a channel, in NCHW: Transpose, Cast, Sub, Mul",
        "channel": "a value a channel, scale folded: Transpose, Cast, Sub",
        "row": "**a row of the image, scale folded: Cast, Sub, Transpose** (what is exported)",
    }
    engines = values["sections"]["uint8_input"]["engines"]
    rows = [
        [
            text,
            *(
                interval(engine["times"]["ratio"][head]) if head in engine["times"]["ratio"] else "–"
                for engine in engines.values()
            ),
        ]
        for head, text in names.items()
    ]
    return markdown(["how normalisation is written", *engines], rows)


def rows_of_three(values: Values) -> str:
    """The subtraction alone."""
    times = values["sections"]["rows_of_three"]["times"]
    names = {"channel": "one value a channel, (1, 1, 1, 3)", "row": "one image row, (1, 1, 224, 3)"}
    rows = [
        [text, f"{times['median_ms'][name]:.3f} ms", interval(times["ratio"][name])]
        for name, text in names.items()
    ]
    return markdown(["constant subtracted from (1, 224, 224, 3)", "time", "ratio"], rows)


def int8(values: Values) -> str:
    """Other files' times over ours, and how close each int8 is to float32."""
    rows = []
    for name, model in values["sections"]["int8"]["models"].items():
        cosine, batches = model["cosine"], model["by_batch"]
        rows.append(
            [
                name,
                *(
                    f"{by_batch['ratio'][file]['median']:.2f}" if file in by_batch["ratio"] else "–"
                    for file in ("tool's int8", "ours fp32", "no arguments")
                    for by_batch in batches.values()
                ),
                *(f"{cosine[file]:.4f}" for file in ("ours int8", "tool's int8")),
            ]
        )
    batches = next(iter(values["sections"]["int8"]["models"].values()))["by_batch"]
    columns = [
        f"{file} / ours, batch {batch}"
        for file in ("tool's int8", "fp32", "no arguments")
        for batch in batches
    ]
    return markdown(["model", *columns, "cosine ours", "cosine tool's"], rows)


def presets(values: Values) -> str:
    """Asymmetric activations against symmetric ones in OpenVINO."""
    symmetric, asymmetric = "performance (symmetric)", "mixed (asymmetric)"
    rows = [
        [
            f"{name} / {batch}",
            *(f"{cell['median_ms'][file]:.2f} ms" for file in ("f32", symmetric, asymmetric)),
            interval(cell["ratio"][asymmetric]),
            *(f"{model['cosine'][file]:.4f}" for file in (symmetric, asymmetric)),
        ]
        for name, model in values["sections"]["presets"]["models"].items()
        for batch, cell in model["by_batch"].items()
    ]
    header = [
        "model / batch",
        "f32",
        "symmetric",
        "asymmetric",
        "asymmetric / symmetric",
        "cosine sym.",
        "cosine asym.",
    ]
    return markdown(header, rows)


def static_batch(values: Values) -> str:
    """A network open to any batch against one compiled for the batch it gets."""
    rows = [
        [
            f"{name} / {batch}",
            *(f"{cell['median_ms'][file]:.2f} ms" for file in ("fixed", "open")),
            interval(cell["ratio"]["open"]),
            f"{model['int8_relative_difference']:.1%}",
        ]
        for name, model in values["sections"]["static_batch"]["models"].items()
        for batch, cell in model["by_batch"].items()
    ]
    return markdown(
        ["model / batch", "compiled for the batch", "open to any", "open / fixed", "int8 differs by"], rows
    )


def smoothing(values: Values) -> str:
    """SmoothQuant on and off."""
    files = ("not smoothed", "smoothed")
    rows = [
        [
            name,
            *(f"{model['error'][file]:.3f}" for file in files),
            interval(model["by_batch"]["1"]["ratio"]["not smoothed"]),
        ]
        for name, model in values["sections"]["smoothing"]["models"].items()
    ]
    return markdown(["model", "error not smoothed", "error smoothed", "time not smoothed / smoothed"], rows)


def merged(values: Values) -> str:
    """Merged networks."""
    rows = [
        [
            f"`{name}`",
            f"{model['parameters_before'] / 1e6:.2f} M",
            f"{model['parameters_after'] / 1e6:.2f} M",
            f"{model['relative_difference']:.1e}",
        ]
        for name, model in values["sections"]["merged"]["models"].items()
    ]
    return markdown(
        ["architecture", "parameters before", "after", "largest relative difference of logits"], rows
    )


def traps(values: Values) -> str:
    """Mean probability of the right classes by padding and normalisation."""
    rows = []
    for row in sorted(values["sections"]["traps"]["rows"], key=lambda row: -row["mean_probability"]):
        mark = "**" if row["is_ours"] else ""
        rows.append(
            [
                f"{row['padding']} (`{row['architecture']}`)",
                row["normalisation"],
                f"{mark}{row['mean_probability']:.3f}{mark}",
            ]
        )
    return markdown(["padding, epsilon", "mean, std", "mean probability of the right classes"], rows)


def waiting(values: Values) -> str:
    """Threads that spin, and ratios of one file to itself with and without waiting for them."""
    rows = [
        [
            f"{name}, {engine}",
            f"{cell['spins_ms']:.0f} ms",
            *(f"{timing['median_ms']:.2f} ms" for timing in cell["timings"].values()),
            *(f"{timing['ratio']['spread']:.2f}" for timing in cell["timings"].values()),
        ]
        for name, engines in values["sections"]["waiting"]["models"].items()
        for engine, cell in engines.items()
    ]
    header = [
        "file, engine",
        "CPU time after a call",
        "a call, waiting",
        "at once",
        "spread of the ratio, waiting",
        "at once",
    ]
    return markdown(header, rows)


TABLES: dict[str, Callable[[Values], str]] = {
    "uint8_input": uint8_input,
    "rows_of_three": rows_of_three,
    "int8": int8,
    "presets": presets,
    "static_batch": static_batch,
    "smoothing": smoothing,
    "merged": merged,
    "traps": traps,
    "waiting": waiting,
}


def export_table(values: Values) -> str:
    """How many architectures of each family agree with PyTorch, the largest difference among them, and the rest."""
    families: dict[str, list[Values]] = {}
    for row in values["rows"].values():
        families.setdefault(row["family"], []).append(row)
    rows = []
    for family, members in [*families.items(), ("**all**", list(values["rows"].values()))]:
        agreeing = [row["relative_difference"] for row in members if row["status"] == "agrees"]
        rows.append([family, str(len(members)), str(len(agreeing)), f"{max(agreeing):.0e}"])
    text = markdown(["family", "measured", "agree", "largest relative difference of those"], rows)
    for name, row in values["rows"].items():
        if row["status"] == "differs":
            exact = row["from_float64"]
            text += (
                f"\n`{name}` is above the limit of {values['tolerance']:.0e} with these weights: "
                f"{row['relative_difference']:.2e}. From the same network in float64, PyTorch is {exact['torch']:.0e} "
                f"away and the file {exact['onnxruntime']:.0e}.\n"
            )
        elif row["status"] == "failed":
            text += f"\n`{name}` does not export: {row['reason']}\n"
    return text


def interval(ratio: Values) -> str:
    """A median ratio with its confidence interval."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
