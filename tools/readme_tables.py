"""Write the measured tables of README and docs/, and the README's picture, from the committed results.

So no figure is typed by hand: what stands between `<!-- table:NAME -->` and `<!-- /table -->` is made by the function
of that name in `TABLES`.

python tools/readme_tables.py            # rewrite what stands between the markers, and docs/images/engines.svg
python tools/readme_tables.py --check    # exit 1 if a page says something else than the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import choices_tables
import compression_tables
import decoder_tables
from choices_tables import markdown

from cveff.files import atomic_path, write_text

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "model_zoo" / "results"
PICTURE = ROOT / "docs" / "images" / "engines.svg"
PEERS = ("ONNX Runtime fp32", "ONNX Runtime int8", "OpenVINO", "OpenVINO f32", "NNCF int8")
OURS = "cveff deploy"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a page is stale")
    arguments = parser.parse_args()
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        written = filled(text, page.name)
        if written != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if not arguments.check:
                write_text(page, written)
    if arguments.check:
        sys.exit(
            f"{', '.join(stale)}: not what model_zoo/results says; run tools/readme_tables.py" if stale else 0
        )
    draw(result("engines"), PICTURE)


def filled(text: str, page: str) -> str:
    """`text` with every `<!-- table:NAME -->` block made anew.

    Raises:
        SystemExit: a block of a name that no function makes, or one without an end.
    """

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise SystemExit(f"{page} asks for table:{name}; there are {', '.join(TABLES)}")
        file, make = TABLES[name]
        return match[1] + make(result(file)) + match[3]

    blocks = re.compile(r"(<!-- table:(\w+) -->\n)(?:(?!<!-- table:).)*?(<!-- /table -->)", re.DOTALL)
    written, count = blocks.subn(block, text)
    if count != text.count("<!-- table:"):
        raise SystemExit(f"{page} has a <!-- table:NAME --> without <!-- /table -->")
    return written


def result(name: str) -> dict[str, Any]:
    """A committed result by name."""
    values: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return values


def fashion_mnist(values: dict[str, Any]) -> str:
    rows = []
    for name, model in values["models"].items():
        first = next(iter(model["seeds"].values()))
        single = first["latency"]["1"]
        accuracy, loss = model["int8_accuracy"], model["loss_points"]
        rows.append(
            [
                name,
                f"{model['parameters']:,}",
                f"{100 * accuracy['mean']:.2f}%"
                + (f" ± {50 * accuracy['spread']:.2f}" if model["runs"] > 1 else ""),
                f"{100 * model['fp32_accuracy']['mean']:.2f}%",
                f"{loss['largest']:+.2f}",
                f"{first['int8_bytes'] / 1000:.0f} kB",
                f"{single['int8']['median_ms']:.3f} ms",
                f"{single['torch']['median_ms']:.2f} ms",
            ]
        )
    header = ["model", "parameters", "int8 file", "fp32 module", "most lost", "int8 size", "int8", "PyTorch"]
    return markdown(header, rows)


def engines(values: dict[str, Any]) -> str:
    rows = []
    for name, by_batch in values["cells"].items():
        for batch, cell in by_batch.items():
            latency = cell["latency_ms"]
            best = min(PEERS, key=lambda peer: latency[peer]["median"])
            times = [
                f"**{latency[peer]['median']:.2f}**" if peer == best else f"{latency[peer]['median']:.2f}"
                for peer in PEERS
            ]
            chosen = f"{cell['chosen']['engine']} {cell['chosen']['precision']}"
            ours = f"**{latency[OURS]['median']:.2f}**"
            rows.append([f"{name} / {batch}", *times, ours, chosen, f"{cell['best_peer_over_cveff']:.2f}"])
    return markdown(["model / batch", *PEERS, "cveff", "it chose", "best peer / cveff"], rows)


def lite0(values: dict[str, Any]) -> str:
    rows = [
        [name, f"{100 * row['agreement']:.1f}%", f"{row['cosine']:.3f}", str(row["crops"])]
        for name, row in sorted(values["rows"].items(), key=lambda item: -item[1]["agreement"])
    ]
    return markdown(["int8 file", "same top-1 as fp32", "cosine of logits", "crops"], rows)


def lite0_intervals(values: dict[str, Any]) -> str:
    rows = []
    for name, row in sorted(values["rows"].items(), key=lambda item: -item[1]["agreement"]):
        low, high = row["interval"]
        rows.append([name, f"{row['agreement']:.3f}", f"{low:.3f}–{high:.3f}", f"{row['cosine']:.4f}"])
    return markdown(["int8 file", "agreement", "95%", "cosine of logits"], rows)


def startup(values: dict[str, Any]) -> str:
    rows = []
    for name, item in values["measured"].items():
        bar = values["bars"][name.split()[0]]
        memory = f"{item['peak_rss_mb']:.0f} MB" if "peak_rss_mb" in item else "–"
        what = {"import": "`import cveff`", "help": "`cveff --help`"}.get(name, f"first prediction, {name}")
        rows.append([what, f"{item['seconds']['median']:.2f} s", f"{bar} s", memory])
    return markdown(["fresh process", "median", "limit", "peak memory"], rows)


def tasks(values: dict[str, Any]) -> str:
    """Detectors and segmentation networks: what their files share with torchvision, and times."""
    rows = []
    for network, files in values["rows"].items():
        for kind, found in files.items():
            option, _, value = kind.partition("=")
            times = found["latency"]
            low, high = times["speedup_interval"]
            rows.append(
                [
                    network,
                    f'`{option}="{value}"`',
                    f"{found['answers']:,}",
                    f"{100 * found['matched']:.4f}%",
                    f"{times['torch_ms']:.0f} ms",
                    f"{times['file_ms']:.0f} ms",
                    f"{times['speedup']:.2f} ({low:.2f}–{high:.2f})",
                ]
            )
    header = ["network", "file", "detections or pixels", "the same", "PyTorch", "ONNX Runtime", "speed-up"]
    return markdown(header, rows)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "fashion_mnist": ("fashion_mnist", fashion_mnist),
    "engines": ("engines", engines),
    "lite0": ("lite0", lite0),
    "lite0_intervals": ("lite0", lite0_intervals),
    "startup": ("startup", startup),
    "tasks": ("tasks", tasks),
    "export_table": ("export_table", choices_tables.export_table),
    **{name: ("choices", make) for name, make in choices_tables.TABLES.items()},
    **{name: (name, make) for name, make in compression_tables.TABLES.items()},
    "prune_quality_means": ("prune_quality", compression_tables.prune_quality_means),
    **decoder_tables.TABLES,
}


def draw(values: dict[str, Any], path: Path) -> None:
    """One row a model and batch: every tool's time as a multiple of the shipped bundle's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "cveff"
    labels, points = [], {peer: [] for peer in PEERS}
    for name, by_batch in values["cells"].items():
        for batch, cell in by_batch.items():
            labels.append(f"{name}, batch {batch}")
            for peer in PEERS:
                points[peer].append(cell["ratio"][peer]["median"])
    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(labels) + 1.3))
    rows = range(len(labels))
    for peer, marker, colour in zip(
        PEERS, "osD^v", ("#1f77b4", "#ff7f0e", "#9467bd", "#8c564b", "#2ca02c"), strict=True
    ):
        axes.scatter(points[peer], rows, marker=marker, s=34, color=colour, label=peer, zorder=3, alpha=0.85)
    axes.axvline(1, color="black", linewidth=1.5)
    axes.annotate(
        "the bundle cveff ships",
        (1, -0.9),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=9,
        annotation_clip=False,
    )
    axes.set_xscale("log", base=2)
    ticks = [tick for tick in (0.5, 1, 2, 4, 8, 16, 32) if tick <= 1.1 * max(map(max, points.values()))]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.set_xlabel("time of each tool's default build, as a multiple of ours (right is slower)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.4, -1.1 / len(labels)), ncols=5, frameon=False, fontsize=8
    )
    figure.patch.set_facecolor("white")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
