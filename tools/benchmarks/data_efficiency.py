"""Fashion-MNIST with less work: tokens dropped from a ViT's blocks, and a part of the images in place of all.

"tokens": samples a second over the whole run and accuracy, with and without random layer-wise token dropping.
"samples": accuracy on all images, on the part a metric selects, and on a random part of the same size; a curriculum
against the same number of samples in random order.

python tools/benchmarks/data_efficiency.py
python tools/benchmarks/data_efficiency.py --only tokens --seeds 0
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch

import cveff
from cveff.data import Augmentation, Data
from cveff.data import load as load_data
from cveff.model import Model
from cveff.pipeline import create_for, evaluate
from cveff.recipe import ModelSettings
from cveff.train import Train
from cveff.train.curriculum import Curriculum
from cveff.train.feed import Difficulty
from cveff.train.loop import SUMMARY
from cveff.train.selection import Selection
from cveff.train.token_drop import TokenDrop

VIT = ModelSettings(
    architecture="vit_tiny_patch16_224",
    arguments={"patch_size": 4, "embed_dim": 96, "depth": 8, "num_heads": 3},
)
CONVOLUTIONS = ModelSettings(
    architecture="small_resnet_s", arguments={"widths": (16, 32, 64), "depths": (0, 1, 1)}
)
AUGMENTATION = Augmentation(flip="alternating", crop_padding=2)
LEAST_SPEEDUP, MOST_POINTS, LARGEST_SHARE, EQUAL_POINTS = 1.25, 0.3, 0.75, 0.1
COLUMNS = ("", "accuracy %", "±", "samples, share", "with proxy", "times as fast")


def cells(part: str, epochs: int) -> dict[str, Train]:
    """What is compared, by name; the first is what the others are compared with."""
    if part == "tokens":
        plain = Train(
            epochs=epochs, batch_size=128, optimizer="adamw", learning_rate=2e-3, weight_decay=0.05,
            clip_norm=1.0, augmentation=AUGMENTATION,
        )  # fmt: skip
        return {
            "all tokens": plain,
            "dropped": replace(plain, token_drop=TokenDrop(start=16)),
            "dropped, but for the class's": replace(plain, token_drop=TokenDrop(start=16, keep_prefix=True)),
        }
    plain = Train(
        epochs=epochs, batch_size=128, optimizer="muon", weight_decay=1e-3, schedule="triangular",
        warmup_epochs=0.0, augmentation=AUGMENTATION, difficulty=Difficulty(proxy_epochs=1),
    )  # fmt: skip
    fewer = replace(plain, epochs=max(1, int(LARGEST_SHARE * epochs)))
    return {
        "all images": plain,
        **{
            f"{metric}, {share:.0%}": replace(plain, selection=Selection(keep=share, metric=metric))
            for share in (LARGEST_SHARE, 0.6)
            for metric in ("el2n", "confidence", "random")
        },
        "curriculum by loss, fewer epochs": replace(fewer, curriculum=Curriculum(("loss",), start=0.4)),
        "fewer epochs": fewer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=["tokens", "samples"], default=["tokens", "samples"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="2,000 images, one epoch, one seed")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument(
        "--out", type=Path, help="JSON file; by default model_zoo/results/data_efficiency.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seeds, epochs = (arguments.seeds[:1], 1) if arguments.quick else (arguments.seeds, arguments.epochs)
    out = arguments.out or common.output("data_efficiency.json", arguments.quick)
    settings = {"epochs": epochs, "threads": arguments.threads}
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    for part in arguments.only:
        found = results.values.setdefault(part, {})
        # Seed by seed and in turns, so that what is compared ran close together.
        for seed in seeds:
            for name, train in cells(part, epochs).items():
                key = f"{name}, seed {seed}"
                if key not in found:
                    found[key] = one_run(part, name, train, seed, arguments.quick)
                    results.save()
        verdict = summary(part, list(cells(part, epochs)), found, seeds)
        results.values[f"{part} summary"] = verdict
        results.save()
        common.table(
            f"Fashion-MNIST, {part}, {epochs} epochs, {len(seeds)} seeds",
            COLUMNS,
            [(name, *values.values()) for name, values in verdict["rows"].items()],
            note="; ".join(verdict["missed"]) or "every bar is met",
        )


def one_run(part: str, name: str, train: Train, seed: int, quick: bool) -> dict[str, Any]:
    """Train, going on where an earlier run was stopped, and score on the test split."""
    data = load_data("fashion-mnist", seed=seed)
    if quick:
        assert data.train is not None
        data = replace(data, train=data.train.subset(range(2_000)), test=data.val)
    folder = common.ROOT / "runs" / ("quick" if quick else "") / "data_efficiency" / f"{part}-{name}-{seed}"
    trained = cveff.apply(
        create(part, data, seed), train, data=data, seed=seed, folder=folder, resume=True,
        progress=common.Lines(f"{name}, seed {seed}"),
    )  # fmt: skip
    consumed = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    proxy = folder / "proxy" / SUMMARY
    return {
        "accuracy": evaluate(trained, data),
        "consumed": consumed,
        "proxy_samples": json.loads(proxy.read_text(encoding="utf-8"))["samples"] if proxy.is_file() else 0,
    }


def create(part: str, data: Data, seed: int) -> Model:
    return create_for(VIT if part == "tokens" else CONVOLUTIONS, data, seed=seed)


def summary(part: str, names: list[str], found: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """Figures by name, relative to the first, and which bars are missed."""
    runs = {name: [found[f"{name}, seed {seed}"] for seed in seeds] for name in names}
    first = runs[names[0]]
    rows = {name: _figures(items, first) for name, items in runs.items()}
    full, missed = rows[names[0]]["accuracy"], []
    if part == "tokens":
        best = max((row for name, row in rows.items() if name != names[0]), key=lambda row: row["accuracy"])
        if best["speed"] < LEAST_SPEEDUP:
            missed.append(f"MISSED: {best['speed']:.2f} times as fast, not {LEAST_SPEEDUP}")
        if best["accuracy"] < full - MOST_POINTS:
            missed.append(f"MISSED: {full - best['accuracy']:.2f} points lost, more than {MOST_POINTS}")
        return {"rows": rows, "missed": missed}
    pairs = [
        (name, f"random, {name.split(', ')[1]}")
        for name in names
        if name.split(",")[0] in ("el2n", "confidence")
    ]
    pairs.append(("curriculum by loss, fewer epochs", "fewer epochs"))
    winners = [
        name
        for name, rival in pairs
        if rows[name]["accuracy"] >= full - EQUAL_POINTS and rows[name]["accuracy"] > rows[rival]["accuracy"]
    ]
    if not winners:
        missed.append("MISSED: no selection and no curriculum equals all images and beats chance")
    return {"rows": rows, "winners": winners, "missed": missed}


def _figures(items: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, float]:
    accuracy = [100 * item["accuracy"] for item in items]
    shares = [a["consumed"]["samples"] / b["consumed"]["samples"] for a, b in zip(items, first, strict=True)]
    proxies = [
        (a["consumed"]["samples"] + a["proxy_samples"]) / b["consumed"]["samples"]
        for a, b in zip(items, first, strict=True)
    ]
    return {
        "accuracy": statistics.mean(accuracy),
        "spread": statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
        "share": statistics.mean(shares),
        "share_with_proxy": statistics.mean(proxies),
        "speed": statistics.median(_speed(a) / _speed(b) for a, b in zip(items, first, strict=True)),
    }


def _speed(item: dict[str, Any]) -> float:
    """Samples a second of training, validations left out."""
    consumed = item["consumed"]
    return float(consumed["samples"] / (consumed["seconds"] - consumed["evaluation_seconds"]))


if __name__ == "__main__":
    main()
