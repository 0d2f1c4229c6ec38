"""Early exit on Fashion-MNIST at 64×64: a ResNet and a ViT, their staged bundles against the whole networks' files.

Bars, on the 10,000 test images and the deployed files in turns: at most 0.55 of the whole network's mean time at
batch 1 and 0.75 at batch 8, at 0.3 points lost or less. A run that was stopped goes on where it was.

python tools/benchmarks/early_exit.py                  # both, trained for hours on two cores
python tools/benchmarks/early_exit.py --only resnet
python tools/benchmarks/early_exit.py --quick          # one epoch of tiny ones: that it works, not what it reaches
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch

import cveff
from cveff.data import Data
from cveff.data import load as load_data
from cveff.data.augment import Augmentation
from cveff.dynamic import EarlyExit, Goal
from cveff.export import staged
from cveff.export.cascade import cascade
from cveff.model import Model
from cveff.train import Train

INPUT = cveff.InputSpec(
    size=(64, 64), channels=1, mean=(0.286,), std=(0.353,), interpolation="bilinear", crop=1.0, enlarge=True
)
MODELS: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "resnet": ("resnet18", {"channels": [32, 64, 128, 256]}, "sgd", 0.1),
    "vit": (
        "vit_tiny_patch16_224",
        {"patch_size": 8, "embed_dim": 128, "depth": 8, "num_heads": 4},
        "adamw",
        1e-3,
    ),
}
MOST_LATENCY = {1: 0.55, 8: 0.75}
MOST_POINTS = 0.3
COLUMNS = (
    "network",
    "full %",
    "staged %",
    "points lost",
    "batch 1",
    "batch 8",
    "leave at each exit %",
    "bars",
)


def main() -> None:
    arguments = parsed(__doc__, "early_exit", MODELS)
    settings = {"threads": arguments.threads, "epochs": arguments.epochs, "seed": arguments.seed}
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    found = results.values.setdefault("networks", {})
    data = load_data("fashion-mnist", seed=arguments.seed)
    if arguments.quick:
        data = first(data, 512)
        staged.STAGE_SECONDS = staged.STREAM_SECONDS = 0.5
    for name in arguments.only:
        if name not in found:
            found[name] = one_network(name, data, arguments)
            results.save()
    for values in found.values():
        values.update(verdict(values))
    results.save()
    common.table(
        "Fashion-MNIST at 64×64, deployed files, share of the whole network's mean time",
        COLUMNS,
        [row(name, values) for name, values in found.items()],
        note="Thresholds were chosen on validation images for 0.3 points lost at most, one standard error included.",
    )


def one_network(name: str, data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with exits, deploy, and read the figures off the bundle's manifest."""
    folder = arguments.models / name
    model = trained(name, data, folder, arguments)
    made = cveff.deploy(
        model,
        data=data,
        target=target(arguments.threads),
        out=folder / "staged.bundle",
        exits=Goal(accuracy_drop=100 if arguments.quick else MOST_POINTS),
        progress=common.Lines(name),
    )
    again = {
        gate: figures(
            cascade(
                made.path,
                data=data,
                out=folder / f"{gate}.bundle",
                exits=Goal(accuracy_drop=100 if arguments.quick else MOST_POINTS),
                gate=gate,
                threads=arguments.threads,
                progress=common.Lines(f"{name}, {gate}"),
            ).manifest
        )
        for gate in (() if arguments.quick else ("margin", "entropy"))
    }
    return {**figures(made.manifest), "other_gates": again}


def figures(manifest: Any) -> dict[str, Any]:
    """What the bars are about, from a staged bundle's manifest."""
    stages, metrics = manifest["stages"], manifest["metrics"]
    return {
        "engine": manifest["engine"]["name"],
        "gate": stages["gate"],
        "full_accuracy": stages["full"]["accuracy"],
        "accuracy": metrics["accuracy"]["deployed"],
        "images": metrics["images"]["count"],
        "exits": stages["evaluation"]["exits"],
        "stage_ms": stages["latency_ms"],
        "full_ms": stages["full"]["latency_ms"],
        "share": {str(item["batch"]): item["staged_over_full"] for item in metrics["latencies"]},
        "rounds": {str(item["batch"]): item["rounds"] for item in metrics["latencies"]},
    }


def verdict(values: dict[str, Any]) -> dict[str, Any]:
    """Whether every bar is met, and which are not."""
    lost = 100 * (values["full_accuracy"] - values["accuracy"])
    missed = [
        f"batch {batch}: {values['share'][str(batch)]:.3f} > {most}"
        for batch, most in MOST_LATENCY.items()
        if values["share"][str(batch)] > most
    ]
    missed += [f"{lost:.2f} points lost > {MOST_POINTS}"] if lost > MOST_POINTS + 1e-9 else []
    return {"points_lost": lost, "missed": missed, "passes": not missed}


def row(name: str, values: dict[str, Any]) -> tuple[object, ...]:
    total = sum(values["exits"])
    return (
        name,
        100 * values["full_accuracy"],
        100 * values["accuracy"],
        values["points_lost"],
        values["share"]["1"],
        values["share"]["8"],
        " ".join(f"{100 * count / total:.0f}" for count in values["exits"]),
        "PASS" if values["passes"] else "; ".join(values["missed"]),
    )


def trained(name: str, data: Data, folder: Path, arguments: argparse.Namespace) -> Model:
    """The network with exits, trained jointly, or the finished one of an earlier run."""
    if (folder / "model" / "model.json").is_file() and not arguments.quick:
        return cveff.load(folder / "model")
    architecture, settings, optimizer, rate = MODELS[name]
    torch.manual_seed(arguments.seed)
    model = cveff.create(architecture, labels=data.labels, input=INPUT, timm_arguments=settings)
    made = cveff.apply(
        model,
        EarlyExit(train=training(optimizer, rate, arguments)),
        data=data,
        seed=arguments.seed,
        folder=folder / "training",
        resume=not arguments.quick,
        progress=common.Lines(name),
    )
    cveff.save(made, folder / "model")
    return made


def training(optimizer: str, rate: float, arguments: argparse.Namespace) -> Train:
    """How these networks are trained at 64×64."""
    return Train(
        epochs=arguments.epochs,
        batch_size=128,
        optimizer=optimizer,  # type: ignore[arg-type]
        learning_rate=rate,
        weight_decay=5e-4 if optimizer == "sgd" else 0.05,
        warmup_epochs=min(1.0, arguments.epochs / 4),
        ema=0.998 if not arguments.quick else 0.0,
        augmentation=Augmentation(flip="random", crop_padding=4),
    )


def target(threads: int) -> cveff.Target:
    """The engines that run stages."""
    return cveff.Target(
        name="staged",
        description="float32 on CPU engines",
        candidates=(("onnxruntime", "fp32"), ("openvino", "fp32")),
        threads=threads,
        batch_sizes=(1, 8),
    )


def first(data: Data, count: int) -> Data:
    """The first images of each split."""
    splits = {
        name: split.subset(range(min(count, len(split))), name)
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
        if split is not None
    }
    return replace(data, **splits)


def parsed(description: str | None, name: str, networks: Iterable[str]) -> argparse.Namespace:
    """The command line of a benchmark `name` that trains some of `networks` and deploys them in stages."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    known = list(networks)
    parser.add_argument("--only", nargs="+", choices=known, default=known, help="which networks")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, help=f"folder of runs; by default runs/{name}")
    parser.add_argument("--quick", action="store_true", help="one epoch on 512 images")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help=f"JSON file; by default model_zoo/results/{name}.json")
    arguments = parser.parse_args()
    arguments.epochs = 1 if arguments.quick else arguments.epochs
    runs = common.ROOT / "runs" / ("quick" if arguments.quick else "") / name
    arguments.models = arguments.models or runs
    arguments.out = arguments.out or common.output(f"{name}.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
