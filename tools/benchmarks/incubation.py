"""Deep Incubation against end-to-end training of a 12-block ViT on Fashion-MNIST, at equal floating-point operations.

python tools/benchmarks/incubation.py
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import common
import small_vits
import torch

from cveff.train.flops import training_flops
from cveff.train.incubation import Incubate
from cveff.train.incubation.parts import divide
from cveff.train.incubation.task import images_of
from cveff.train.state import load_state

MODULES = 4
PATH_BAR = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--meta", type=int, default=8, help="epochs of the meta model")
    parser.add_argument("--incubate", type=int, default=15, help="epochs of each module")
    parser.add_argument("--tune", type=int, default=4, help="epochs of the assembled network")
    parser.add_argument("--images", type=int, default=12_000, help="training images")
    parser.add_argument("--quick", action="store_true", help="one epoch each, 500 images, one seed")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/incubation.json")
    arguments = parser.parse_args()
    epochs = (1, 1, 1) if arguments.quick else (arguments.meta, arguments.incubate, arguments.tune)
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    settings = {
        "epochs": epochs,
        "modules": MODULES,
        "images": arguments.images,
        "threads": torch.get_num_threads(),
    }
    out = arguments.out or common.output("incubation.json", arguments.quick)
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    cells = results.values.setdefault("cells", {})
    for seed in seeds:
        for name in ("incubated", "end to end"):
            key = f"{name}, seed {seed}"
            if key not in cells:
                given = cells.get(f"incubated, seed {seed}", {}).get("flops", 0.0)
                cells[key] = cell(name, seed, epochs, given, arguments)
                results.save()
    results.values["summary"] = summary(cells, seeds)
    results.save()
    common.table(
        f"12-block ViT on Fashion-MNIST, test split, {MODULES} modules",
        ("training", "accuracy %", "PFLOP", "seconds", "critical path, s"),
        [
            row(name, [cells[f"{name}, seed {seed}"] for seed in seeds])
            for name in ("incubated", "end to end")
        ],
    )
    for line in missed(results.values["summary"]):
        common.console.print(line)


def cell(name: str, seed: int, epochs: tuple[int, int, int], flops: float, arguments: Any) -> dict[str, Any]:
    """One training, with its accuracy and cost.

    Args:
        flops: what end-to-end training may spend; it gets the next whole epoch.
    """
    data = small_vits.images(arguments.quick, arguments.images, seed)
    model = small_vits.vit(data, seed)
    folder = (
        small_vits.RUNS
        / f"incubation{'-quick' if arguments.quick else ''}"
        / f"{name.replace(' ', '-')}-{seed}"
    )
    if name == "incubated":
        meta, incubate, tune = epochs
        step = Incubate(
            MODULES,
            meta=small_vits.training(meta),
            incubate=small_vits.training(incubate),
            tune=small_vits.training(tune, warmup_epochs=0.0),
        )
        made = small_vits.trained(model, step, data, seed, folder)
        record = json.loads((folder / "incubation.json").read_text(encoding="utf-8"))
        frozen = frozen_equal(model, folder)
        resumed = any(phase["resumed"] for phase in record["phases"].values())
        return {**record, "accuracy": small_vits.accuracy(made, data), "frozen": frozen, "resumed": resumed}
    one = training_flops(model.module, model.spec.input)
    epoch = images_of(small_vits.training(1), data) * one
    train = small_vits.training(max(1, math.ceil(flops / epoch)))
    resumed = (folder / "state.safetensors").is_file()
    started = time.monotonic()
    made = small_vits.trained(model, train, data, seed, folder)
    seconds = time.monotonic() - started
    return {
        "accuracy": small_vits.accuracy(made, data),
        "flops": train.epochs * epoch,
        "epochs": train.epochs,
        "seconds": seconds,
        "critical_path_seconds": seconds,
        "resumed": resumed,
    }


def frozen_equal(model: Any, folder: Path) -> bool:
    """Whether each module's saved network has the meta model's own tensors outside the module, bit by bit."""
    from cveff.model import load

    meta = load_state(folder / "meta" / "outcome.safetensors")["tensors"]
    for index, part in enumerate(divide(model.module, model.spec.input, MODULES)):
        state = load(folder / f"module-{index}" / "best").module.state_dict()
        others = [name for name in state if name not in part.tensors]
        if not others or not all(torch.equal(state[name], meta[name]) for name in others):
            return False
    return True


def summary(cells: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """The bars, over seeds."""
    ours, theirs = ([cells[f"{name}, seed {seed}"] for seed in seeds] for name in ("incubated", "end to end"))
    paths = [a["critical_path_seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
    figures = {
        "accuracy_difference": statistics.mean(
            a["accuracy"] - b["accuracy"] for a, b in zip(ours, theirs, strict=True)
        ),
        "flops_ratio": max(a["flops"] / b["flops"] for a, b in zip(ours, theirs, strict=True)),
        "critical_path_ratio": statistics.median(paths),
        "frozen_equal": all(item["frozen"] for item in ours),
        "timed_whole": not any(item["resumed"] for item in (*ours, *theirs)),
    }
    return {**figures, "passes": not missed(figures)}


def missed(figures: dict[str, Any]) -> list[str]:
    """A line for each bar that is not met."""
    lines = []
    if figures["accuracy_difference"] < 0:
        lines.append(f"missed: incubated is {-100 * figures['accuracy_difference']:.2f} points less accurate")
    if figures["flops_ratio"] > 1:
        lines.append(
            f"missed: incubation cost {figures['flops_ratio']:.3f} of end-to-end training's operations"
        )
    if figures["critical_path_ratio"] > PATH_BAR:
        lines.append(
            f"missed: the critical path is {figures['critical_path_ratio']:.2f} of end to end's, bar {PATH_BAR}"
        )
    if not figures["frozen_equal"]:
        lines.append("missed: frozen parts changed")
    if not figures["timed_whole"]:
        lines.append(
            "unsure: a training was stopped and resumed, so that its seconds are of the last go alone"
        )
    return lines


def row(name: str, seeds: list[dict[str, Any]]) -> tuple[object, ...]:
    mean = {
        key: statistics.mean(item[key] for item in seeds)
        for key in ("accuracy", "flops", "seconds", "critical_path_seconds")
    }
    return (
        name,
        100 * mean["accuracy"],
        mean["flops"] / 1e15,
        mean["seconds"],
        mean["critical_path_seconds"],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
