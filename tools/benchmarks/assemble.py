"""A network assembled from stages of trained ones, beside its parents and beside the same stages with random adapters.

Fashion-MNIST, test split. Both assemblies are tuned for the same few epochs.

python tools/benchmarks/assemble.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import small_vits
import torch

import cveff
from cveff.data import Data
from cveff.model import Model
from cveff.pipeline import create_for
from cveff.recipe import ModelSettings
from cveff.train import Train
from cveff.train.stitching import Assemble

PARENTS: dict[str, ModelSettings] = {
    "small_resnet_m": ModelSettings(architecture="small_resnet_m"),
    "resnet18": ModelSettings(architecture="resnet18", arguments={"channels": [32, 64, 96, 128]}),
    "vit": ModelSettings(
        architecture="vit_tiny_patch16_224",
        arguments={
            "patch_size": small_vits.PATCH,
            "embed_dim": small_vits.WIDTH,
            "num_heads": small_vits.HEADS,
            "depth": small_vits.DEPTH,
            "mlp_ratio": 2.0,
        },
    ),
}
STARTS = ("least-squares", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8, help="of each parent")
    parser.add_argument("--adapters", type=int, default=1, help="epochs of the adapters alone")
    parser.add_argument("--tune", type=int, default=2, help="epochs of the assembled network")
    parser.add_argument("--images", type=int, default=20_000, help="training images")
    parser.add_argument("--quick", action="store_true", help="one epoch each, 500 images, one seed")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/assemble.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs = arguments.adapters = arguments.tune = 1
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    settings = {
        "epochs": [arguments.epochs, arguments.adapters, arguments.tune],
        "images": arguments.images,
        "parents": list(PARENTS),
        "threads": torch.get_num_threads(),
    }
    out = arguments.out or common.output("assemble.json", arguments.quick)
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    cells = results.values.setdefault("cells", {})
    for seed in seeds:
        if f"seed {seed}" not in cells:
            cells[f"seed {seed}"] = cell(seed, arguments)
            results.save()
    results.values["summary"] = summary([cells[f"seed {seed}"] for seed in seeds])
    results.save()
    rows = results.values["summary"]["rows"]
    common.table(
        "Assembled from trained stages, Fashion-MNIST, test split",
        ("network", "accuracy %", "parameters", "epochs on top"),
        [(name, 100 * row["accuracy"], row["parameters"], row["epochs"]) for name, row in rows.items()],
        note="means over seeds, which may choose other stages",
    )
    for line in missed(results.values["summary"]):
        common.console.print(line)


def cell(seed: int, arguments: Any) -> dict[str, Any]:
    """Parents, what is assembled of them, and the same assembly from random adapters."""
    data = small_vits.images(arguments.quick, arguments.images, seed)
    runs = small_vits.RUNS / f"assemble{'-quick' if arguments.quick else ''}"
    folders = {name: runs / f"{name}-{seed}" for name in PARENTS}
    rows: dict[str, Any] = {}
    for name, settings in PARENTS.items():
        parent = create_for(settings, data, seed=seed)
        parent = small_vits.trained(parent, training(arguments.epochs), data, seed, folders[name])
        cveff.save(parent, folders[name] / "model")
        rows[name] = row(parent, data, 0)
    first, *others = (folders[name] for name in PARENTS)
    limit = max(item["parameters"] for item in rows.values())
    step = Assemble(
        models=tuple(str(folder) for folder in others),
        max_parameters=limit,
        adapters=training(arguments.adapters, learning_rate=1e-3),
        tune=training(arguments.tune, learning_rate=5e-4),
    )
    given = cveff.load(first / "model")
    choice: dict[str, Any] = {}
    for start in STARTS:
        method = replace(step, start=start)
        if choice:
            method = replace(method, max_parameters=None, use=tuple(choice["choice"]["use"]))
        folder = runs / f"{start}-{seed}"
        joined = replace(method, adapters=Train(epochs=0), tune=Train(epochs=0))
        rows[f"{start}, as joined"] = row(
            small_vits.trained(given, joined, data, seed, folder / "joined"), data, 0
        )
        made = small_vits.trained(given, method, data, seed, folder)
        rows[f"{start}, tuned"] = row(made, data, arguments.adapters + arguments.tune)
        choice = choice or json.loads((folder / "assembly.json").read_text(encoding="utf-8"))
    return {"rows": rows, "assembly": choice}


def training(epochs: int, **settings: Any) -> Train:
    """The same for all networks."""
    return small_vits.training(epochs, **settings)


def row(model: Model, data: Data, epochs: int) -> dict[str, Any]:
    """One line of the table."""
    return {
        "accuracy": small_vits.accuracy(model, data),
        "parameters": model.num_parameters,
        "epochs": epochs,
    }


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and whether fitting the adapters was worth it."""
    rows = {
        name: {
            key: statistics.mean(cell["rows"][name][key] for cell in cells)
            for key in ("accuracy", "parameters", "epochs")
        }
        for name in cells[0]["rows"]
    }
    parents = [rows[name]["accuracy"] for name in PARENTS]
    figures = {
        "rows": rows,
        "over_random": rows["least-squares, tuned"]["accuracy"] - rows["random, tuned"]["accuracy"],
        "over_weakest_parent": rows["least-squares, tuned"]["accuracy"] - min(parents),
        "over_best_parent": rows["least-squares, tuned"]["accuracy"] - max(parents),
    }
    return {**figures, "passes": not missed(figures)}


def missed(figures: dict[str, Any]) -> list[str]:
    """A line for each thing that the method should do and did not."""
    lines = []
    if figures["over_random"] < 0:
        lines.append(f"missed: random adapters end {-100 * figures['over_random']:.2f} points more accurate")
    if figures["over_weakest_parent"] < 0:
        lines.append(
            f"missed: the assembly is {-100 * figures['over_weakest_parent']:.2f} points less accurate than its "
            "weakest parent"
        )
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
