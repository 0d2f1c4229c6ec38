"""Tables of docs/ about compression, made from the committed results of the benchmarks of the same names."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from choices_tables import markdown

Values = dict[str, Any]


def prune_coverage(values: Values) -> str:
    """One row an architecture: what the analysis found, what was left, and what the peer did."""
    rows = []
    for name, row in values["rows"].items():
        mine, peer = row.get("cveff"), row.get("torch-pruning")
        if mine is None:
            continue
        cells = ["–"] * 5
        if len(mine.get("parameters", ())) == 2:
            macs, parameters = (
                [f"{value / unit:.2f}" for value in mine[key]]
                for key, unit in (("macs", 1e9), ("parameters", 1e6))
            )
            cells = [
                str(mine["groups"]),
                str(len(mine["frozen"])),
                " → ".join(macs),
                " → ".join(parameters),
                f"{mine['oracle']:.0e}",
            ]
        rows.append(
            [
                f"`{name}`",
                "yes" if mine["ok"] else "no",
                *cells,
                f"{mine['analysis_s']:.1f} s" if "analysis_s" in mine else "–",
                "–" if peer is None else "yes" if peer["ok"] else "no",
            ]
        )
    header = [
        "architecture",
        "prunes",
        "groups",
        "frozen",
        "GMAC",
        "million parameters",
        "from the law",
        "planned in",
        "torch-pruning",
    ]
    text = markdown(header, rows)
    for name, row in values["rows"].items():
        if not row.get("cveff", {}).get("ok", True):
            text += f"\n`{name}`: {row['cveff'].get('error', 'differs')}\n"
    return text


def latency_table(values: Values) -> str:
    """How blocks and MACs rank and predict held-out models."""
    rows = []
    for threads, cell in values["threads"].items():
        for index, half in enumerate(cell["held_out"]):
            blocks, macs = half["blocks"], half["macs"]
            rows.append(
                [
                    f"{threads}, half {index + 1}",
                    f"**{blocks['spearman']:.3f}**",
                    f"{macs['spearman']:.3f}",
                    f"**{100 * blocks['mean_error']:.0f}%**",
                    f"{100 * macs['mean_error']:.0f}%",
                ]
            )
    header = ["threads", "rank correlation", "that of MACs", "mean error", "that of MACs"]
    return markdown(header, rows)


def latency_goals(values: Values) -> str:
    """What was asked of each architecture, and what its file takes."""
    rows = []
    for key, pair in values["pairs"].items():
        measured, off = "–", pair.get("message", "")
        if pair.get("error") is not None:
            measured, off = f"{pair['share']:.3f}", f"{100 * (pair['share'] / pair['goal'] - 1):+.1f}%"
        name = key.rpartition(" ")[0]
        rows.append(
            [
                f"`{name}`",
                f"{pair['goal']:.2f}",
                measured,
                off,
                f"{pair.get('macs', 0):.2f}",
                f"{pair['seconds']:.0f} s",
            ]
        )
    return markdown(["architecture", "goal", "measured", "off by", "MACs left", "planned in"], rows)


def low_rank(values: Values) -> str:
    """The costliest layers: the least error among factors that are 5 % faster as measured."""
    rows = []
    for name, model in values["models"].items():
        for path, layer in model["layers"].items():
            fast = [row for row in layer["ranks"] if row["milliseconds"] <= 0.95 * layer["milliseconds"]]
            best = min(fast, key=lambda row: row["whitened_error"], default=None)
            cells = ["none is faster", "", "", ""]
            if best is not None:
                cells = [
                    f"{best['method']} {'×'.join(map(str, best['rank']))}",
                    f"{best['milliseconds']:.3f} ms",
                    f"{100 * best['plain_error']:.1f}%",
                    f"{100 * best['whitened_error']:.1f}%",
                ]
            shape = "×".join(map(str, layer["shape"]))
            rows.append([f"{name} `{path}` {shape}", f"{layer['milliseconds']:.3f} ms", *cells])
    return markdown(["layer", "time", "factors", "time", "plain error", "whitened error"], rows)


def importance(values: Values) -> str:
    """Accuracy without training, by criterion, repair and scope: one table a model."""
    text = ""
    columns = (
        ("local", "nothing"),
        ("local", "batch norms"),
        ("local", "compensation, batch norms"),
        ("global", "compensation, batch norms"),
        ("isomorphic", "compensation, batch norms"),
    )
    for name, model in values["models"].items():
        text += f"\n`{name}`, dense {100 * model['dense']:.1f} %, {model['test_images']} test images:\n\n"
        rows = []
        for key in model["accuracy"]:
            criterion, scope, share = key.split("/")
            if scope != "local" or float(share) > 0.5:
                continue
            cells = [
                f"{100 * statistics.mean(model['accuracy'][f'{criterion}/{scope}/{share}'][repair]):.1f}"
                for scope, repair in columns
            ]
            rows.append([f"{100 * float(share):.0f}%", criterion, *cells])
        rows.sort(key=lambda row: row[0])
        header = [
            "removed",
            "criterion",
            "no repair",
            "batch norms",
            "+ compensation",
            "global",
            "isomorphic",
        ]
        text += markdown(header, rows)
    return text.lstrip("\n")


def distill(values: Values) -> str:
    """Accuracy of each loss, and its gain seed by seed over labels only."""
    seeds = list(values["seeds"].values())
    losses = [name for name in seeds[0] if "teacher" not in name and name != "parameters"]
    rows = []
    for loss in sorted(losses, key=lambda loss: -statistics.mean(seed[loss] for seed in seeds)):
        gains = [100 * (seed[loss] - seed["labels only"]) for seed in seeds]
        gain = f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains):.1f}"
        rows.append([loss, _percent([seed[loss] for seed in seeds]), "" if loss == "labels only" else gain])
    return markdown(["loss", "accuracy", "gain over labels only, points"], rows)


def sparsity(values: Values) -> str:
    """Accuracy, size after gzip, and what zeros do to the time."""
    seeds = list(values["seeds"].values())
    rows = []
    for name in seeds[0]:
        found = [seed[name] for seed in seeds]
        speed = [item["speedup"] for item in found]
        rows.append(
            [
                name,
                _percent([item["accuracy"] for item in found]),
                f"{statistics.mean(item['gzip_bytes'] for item in found) / 1000:.0f} kB",
                "1" if name == "dense" else f"{min(speed):.2f}–{max(speed):.2f}",
            ]
        )
    return markdown(["", "accuracy", "gzip of the `.onnx`", "times as fast as dense, by seed"], rows)


def _percent(shares: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(shares):.1f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.1f}%" if len(shares) > 1 else f"{mean}%"


def weight_only(values: Values) -> str:
    """Perplexity and bytes of the language model, then bytes and accuracy of the ViTs' files."""
    language = values["gemma3_270m"]
    tokens = f"{language['fp32']['tokens']:,}"
    text = f"Gemma-3 270M, {tokens} tokens; bytes are of the rounded layers' files:\n\n" + markdown(
        ["weights", "perplexity", "over fp32", "MB", "over fp32"],
        [
            [
                name,
                f"{row['perplexity']:.2f}",
                f"{row.get('perplexity_ratio', 1):.3f}",
                f"{row['linear_bytes'] / 1e6:.1f}",
                f"{row.get('size_ratio', 1):.3f}",
            ]
            for name, row in language.items()
        ],
    )
    for vit in values["vit"].values():
        text += f"\n\n`{vit['architecture']}`, {vit['weights']}; ONNX files in ONNX Runtime:\n\n" + markdown(
            ["weights", "MB", "over fp32", "difference from PyTorch", "accuracy", "agreement with fp32"],
            [
                [
                    name,
                    f"{row['bytes'] / 1e6:.2f}",
                    f"{row['size_ratio']:.3f}",
                    f"{row['difference_from_torch']:.0e}",
                    f"{100 * row['accuracy']:.2f}%" if "accuracy" in row else "–",
                    f"{100 * row['agreement_with_fp32']:.2f}%" if "accuracy" in row else "–",
                ]
                for name, row in vit["rows"].items()
            ],
        )
    return text


def repairs(values: Values) -> str:
    """Each repair of 8-bit rounding by itself: points lost (without labels, answers changed), and the error."""
    networks = values["networks"]
    header = ["changed"]
    for name, network in networks.items():
        has_labels = any("points_lost" in row for row in network.values())
        header += [f"{name}: {'points lost' if has_labels else '% of answers changed'}", "error"]
    names = dict.fromkeys(repair for network in networks.values() for repair in network)
    rows = []
    for repair in names:
        cells = []
        for network in networks.values():
            found = network.get(repair)
            if found is None:
                cells += ["–", "–"]
                continue
            lost = found.get("points_lost", 100 * (1 - found["agreement"]))
            cells += [f"{lost:+.2f}", f"{found['error']:.5f}"]
        rows.append([repair, *cells])
    return markdown(header, rows)


def prune_quality(values: Values) -> str:
    """A row for each network, seed and tool: accuracy before and after it was trained again, and the file's time."""
    rows = []
    for name, row in values["rows"].items():
        times = values["times"].get(name)
        if times is None:
            continue
        dense = row["dense"]
        rows.append(
            [name, "dense", f"{100 * dense['accuracy']:.2f}%", "", "1.000", f"{dense['parameters']:,}"]
        )
        for key, trained in sorted(row.items()):
            tool, _, kind = key.partition(", ")
            if not kind:
                continue
            rows.append(
                [
                    name,
                    f"{tool}, {'taught by the dense network' if kind == 'distilled' else 'labels'}",
                    f"{100 * row[tool]['accuracy']:.2f}%",
                    f"{100 * trained['accuracy']:.2f}%",
                    f"{times[tool]['latency']:.3f} ({times[tool]['least']:.3f}–{times[tool]['most']:.3f})",
                    f"{trained['parameters']:,}",
                ]
            )
    header = ["network, seed", "tool", "pruned", "trained again", "time of the file over dense", "parameters"]
    return markdown(header, rows)


def prune_quality_means(values: Values) -> str:
    """A row for each network, means over its seeds; the better of torch-pruning's criteria in each."""
    names = {
        "mobile": "MobileNetV4-small",
        "resnet": "ResNet-18, half the width",
        "vit": "ViT, 6 blocks of 128",
    }
    rows = []
    for name, label in names.items():
        done = [values["rows"][key] for key in values["times"] if key.startswith(f"{name}-")]
        if not done:
            continue
        peers = [
            max(row[key]["accuracy"] for key in row if key.startswith("torch-pruning") and "," in key)
            for row in done
        ]
        figures = (
            [row["dense"]["accuracy"] for row in done],
            [row["cveff, distilled"]["accuracy"] for row in done],
        )
        rows.append(
            [
                label,
                *(f"{100 * statistics.mean(column):.2f}%" for column in (*figures, peers)),
                f"{len(done)}",
            ]
        )
    return markdown(
        ["", "dense", "cveff, half the time", "torch-pruning's better, half the time", "seeds"], rows
    )


def compress_chain(values: Values) -> str:
    """A row for each step of each chain, and for the bundle that it ended in."""
    rows = []
    for name, network in values["networks"].items():
        for step, found in network["steps"].items():
            figures = [f"{100 * found['accuracy']:.2f}%", f"{found['share']:.3f}", f"{found['parameters']:,}"]
            rows.append([name, step, *figures])
        bundle = network["bundle"]
        low, high = bundle["speedup_interval"]
        rows.append(
            [
                name,
                f"bundle: {bundle['engine']} {bundle['precision']}",
                f"{100 * bundle['accuracy']:.2f}%",
                f"{1 / bundle['speedup']:.3f} ({1 / high:.3f}–{1 / low:.3f})",
                f"{bundle['size_bytes'] / 1000:.0f} kB",
            ]
        )
    return markdown(["network", "step", "test", "time over dense", "parameters, or the file"], rows)


TABLES: dict[str, Callable[[Values], str]] = {
    make.__name__: make
    for make in (
        prune_coverage,
        prune_quality,
        compress_chain,
        latency_table,
        latency_goals,
        low_rank,
        importance,
        distill,
        sparsity,
        weight_only,
        repairs,
    )
}
