"""One process and two gloo ranks train the same network on the embedded digits: their losses, side by side.

python tools/benchmarks/distributed.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import common

# Losses of an epoch: sums over ranks round differently, and training makes the difference grow with every step.
BAR = 0.01
NETWORKS = ("small_resnet_s", "vit_tiny_patch16_224")
WAYS: dict[str, tuple[int, str]] = {"one process": (1, "ddp"), "ddp": (2, "ddp"), "fsdp2": (2, "fsdp2")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one epoch")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/distributed.json")
    arguments = parser.parse_args()
    epochs = 1 if arguments.quick else arguments.epochs
    out = arguments.out or common.output("distributed.json", arguments.quick)
    results = common.Results(out, __file__, {"epochs": epochs}, fresh=arguments.fresh)
    found = results.values.setdefault("runs", {})
    for network in NETWORKS:
        for way in WAYS:
            if f"{network}, {way}" not in found:
                found[f"{network}, {way}"] = trained(network, way, epochs)
                results.save()
    results.values["missed"] = missed(found)
    results.save()
    common.table(
        f"digits, {epochs} epochs, float32",
        ("network", "largest difference of a loss", "accuracy"),
        [(name, f"{difference(found, name):.1e}", f"{run['accuracy']:.4f}") for name, run in found.items()],
        note=f"Differences are relative, from one process's loss of the same epoch; the bar is {BAR}.",
    )
    for text in results.values["missed"]:
        common.console.print(f"missed: {text}")


def trained(network: str, way: str, epochs: int) -> dict[str, object]:
    """Losses of every epoch, on training and validation images, and the accuracy at the end."""
    ranks, strategy = WAYS[way]
    launcher = (
        ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    )
    settings = [f"train.distributed.strategy={strategy!r}", "train.precision='fp32'"]
    if network != NETWORKS[0]:
        settings.append("model.arguments={patch_size=2, embed_dim=64, depth=4, num_heads=4}")
        settings += ["train.optimizer='adamw'", "train.learning_rate=1e-3"]
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [
            "cveff",
            "train",
            "digits",
            "--model",
            network,
            "--epochs",
            str(epochs),
            "--no-deploy",
            "--json",
        ]
        words += ["--out", str(run), *(word for text in settings for word in ("--set", text))]
        process = subprocess.run(
            [sys.executable, "-m", *launcher, *words],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            raise SystemExit(process.stderr)
        lines = (run / "train" / "0-train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [[line["train/loss"], line["val/loss"]] for line in map(json.loads, lines)]
    return {"losses": losses, "accuracy": json.loads(process.stdout)["accuracy"]}


def difference(runs: Mapping[str, Mapping[str, object]], name: str) -> float:
    """The largest relative difference of a loss of a run from one process's."""
    ours, one = (flat(runs[key]["losses"]) for key in (name, f"{name.partition(', ')[0]}, one process"))
    return max(abs(a - b) / b for a, b in zip(ours, one, strict=True))


def flat(losses: object) -> list[float]:
    assert isinstance(losses, Sequence)
    return [float(value) for epoch in losses for value in epoch]


def missed(runs: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The bars that do not hold, in words."""
    return [
        f"{name}: a loss differs by {difference(runs, name):.2%}, the bar is {BAR:.0%}"
        for name in runs
        if difference(runs, name) > BAR
    ]


if __name__ == "__main__":
    main()
